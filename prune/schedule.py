"""When filters are cleared: once and for good (hard pruning), or again and again with regrowth in between (SFP).

A pruned filter is one whose weights, bias, and batch-norm weight and bias are all exactly 0: only then is its output map 0
whatever the input, and the filter can be removed without changing the function. While SFP trains, its cleared filters are
not yet pruned in this sense; the network that it ships is.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.batch_norm import quicken_batch_norms
from models.copies import copied
from models.narrow import NarrowNetwork, narrow
from models.narrow.proof import check_equal_training
from prune.masks import PrunableLayer, SharedNorm, prunable_layers, shared_norms
from utils.errors import UserError
from utils.training.pruning import Pruning


class PruningSchedule(Pruning):
    """What a trainer calls. `model` is the bare network, on its device; `kept` maps layers to the filters that stay,
    and batch norms that several layers share to the entries.

    `kept` holds sorted int64 indices on the CPU, and is empty as long as nothing has been chosen. `example` is a batch of
    images for networks whose Python asks for the size of its input, see `trace_network`.
    """

    def __init__(self, model: nn.Module, *, example: Tensor | None = None):
        self.model, self._example = model, example
        convs = prunable_layers(model, linear=True, example=example)
        layers = (*convs, *shared_norms(model, convs))
        self.layers: dict[str, PrunableLayer | SharedNorm] = {layer.name: layer for layer in layers}
        self.kept: dict[str, Tensor] = {}

    def trained_network(self) -> nn.Module:
        """The network to train in place of `model`."""
        return self.model

    @contextmanager
    def shipped(self) -> Iterator[dict[str, Tensor]]:
        """Within it the model is the pruned network as it is evaluated and saved; gives that network's `kept`."""
        yield self.kept

    def live_channels(self, kept: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """`kept` for each pruned convolution and the batch norm that reads it: what a checkpoint says, and `narrow` takes."""
        pruned = [layer for layer, _ in _losses(self.layers, kept)]
        names = [(name, layer) for layer in pruned for name in (layer.name, layer.norm_name) if name is not None]
        return {name: kept[layer.name].tolist() for name, layer in names}

    def state_dict(self) -> dict[str, Any]:
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError for layers or filters that the model has not got."""
        self.kept = _checked_kept(self.layers, state["kept"])


Mend = Callable[[PruningSchedule, nn.Module], None]  # what is pruned, and the network as it was before


class HardPruning(PruningSchedule):
    """One choice before training: pruned filters are exactly 0 from now on, after every step."""

    def __init__(self, model: nn.Module, kept: Mapping[str, Tensor], *, example: Tensor | None = None):
        super().__init__(model, example=example)
        self.load_state_dict({"kept": kept})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._zeros = _Zeros()
        for layer, pruned in _losses(self.layers, self.kept):
            for tensor in layer.zeroed().values():
                self._zeros.add(tensor, pruned)
        self.hold()

    def hold(self) -> None:
        """Clears what momentum, weight decay and the BN bias' gradient brought back, in a few launches and no sync."""
        self._zeros.restore()


class GradualPruning(HardPruning):
    """Filters go in `steps` steps, the first before training, the others after the first epochs. What is gone stays gone.

    `choose_at(step, kept)` gives what stays at a step, counted from 0, of what has stayed so far (None before the first). It
    must not change anything. At the later ones `mend(schedule, unpruned)` is given the network as it was before, and
    `on_choice(schedule, step)` hears of them. With `kept`, from the state of a resumed run, nothing is chosen here.
    """

    def __init__(
        self,
        model: nn.Module,
        choose_at: Callable[[int, Mapping[str, Tensor] | None], dict[str, Tensor]],
        *,
        steps: int,
        on_choice: Callable[["GradualPruning", int], None],
        mend: Mend | None = None,
        kept: Mapping[str, Tensor] | None = None,
        example: Tensor | None = None,
    ):
        self._choose_at, self._steps, self._on_choice, self._mend = choose_at, steps, on_choice, mend
        super().__init__(model, choose_at(0, None) if kept is None else kept, example=example)

    def after_epoch(self, epoch: int) -> None:
        if epoch + 1 < self._steps:
            self._clear_dead_inputs()
            unpruned = copied(self.model) if self._mend is not None else None
            self.load_state_dict({"kept": self._choose_at(epoch + 1, self.kept)})
            if self._mend is not None:
                self._mend(self, unpruned)
            self._on_choice(self, epoch + 1)

    def _clear_dead_inputs(self) -> None:
        """Weights that only read what is gone must not count in the scores of a filter: in the small network there are none."""
        try:
            small = narrow(self.model, self.live_channels(self.kept), example=self._example)
        except UserError:  # of a network that has no small form they are not known
            return
        self.model.load_state_dict(small.dense_state_dict(idle=self.model.state_dict()))

    def is_final(self, epoch: int) -> bool:
        return epoch + 2 >= self._steps


class PhysicalPruning(PruningSchedule):
    """One choice before training, and the filters are gone from the network that is trained.

    It computes what the network of `HardPruning` computes, step by step, up to rounding. Filters that could not be cut (of a
    layer that is called twice, or that even up the groups of a convolution) are held at 0. Raises UserError for a network
    that has no narrow form.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Tensor], *, example: Tensor | None = None):
        super().__init__(model, example=example)
        self._cut(kept)

    def _cut(self, kept: Mapping[str, Tensor]) -> None:
        self.kept = HardPruning(self.model, kept, example=self._example).kept
        self._network = narrow(self.model, self.live_channels(self.kept), example=self._example)
        quicken_batch_norms(self._network)
        self._zeros = _Zeros()
        for key, pruned in self._pruned_rows().items():
            stored = self._network.stored(key)
            if stored is not None:
                tensor, rows = stored
                self._zeros.add(tensor, torch.isin(torch.tensor(rows), pruned).nonzero().flatten())

    def _pruned_rows(self) -> dict[str, Tensor]:
        """The rows that are 0 in the masked network, by key."""
        return {key: pruned for layer, pruned in _losses(self.layers, self.kept) for key in layer.zeroed()}

    def prove(self, images: Tensor) -> None:
        """Raises UserError unless the small network evaluates and trains as the masked one does, on `images` (N, C, H, W)."""
        check_equal_training(self.model, self._network, images, pruned=self._pruned_rows())

    def trained_network(self) -> NarrowNetwork:
        return self._network

    def hold(self) -> None:
        self._zeros.restore()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"compact": True}


class GradualPhysicalPruning(PhysicalPruning):
    """`GradualPruning` of the same arguments, with the filters gone from the network that is trained: each step cuts a new one.

    The momentum of what stays goes over to it.
    """

    def __init__(
        self,
        model: nn.Module,
        choose_at: Callable[[int, Mapping[str, Tensor] | None], dict[str, Tensor]],
        *,
        steps: int,
        on_choice: Callable[[PruningSchedule, int], None],
        mend: Mend | None = None,
        kept: Mapping[str, Tensor] | None = None,
        example: Tensor | None = None,
    ):
        self._choose_at, self._steps, self._on_choice, self._mend = choose_at, steps, on_choice, mend
        super().__init__(model, choose_at(0, None) if kept is None else kept, example=example)

    def after_epoch(self, epoch: int) -> nn.Module | None:
        if epoch + 1 >= self._steps:
            return None
        self.model.load_state_dict(self._network.dense_state_dict(idle=self.model.state_dict()))
        unpruned = copied(self.model) if self._mend is not None else None
        self._cut(self._choose_at(epoch + 1, self.kept))
        if self._mend is not None:
            self._mend(self, unpruned)
        self._on_choice(self, epoch + 1)
        return self._network

    def is_final(self, epoch: int) -> bool:
        return epoch + 2 >= self._steps

    def carried(self, key: str, value: Tensor, *, before: nn.Module) -> Tensor:
        return self._network.narrowed(key, before.widened(key, value))


class _Zeros:
    """Rows of tensors that are set to 0 again and again."""

    def __init__(self):
        self._tensors: list[Tensor] = []
        self._masks: list[Tensor] = []

    def add(self, tensor: Tensor, rows: Tensor) -> None:
        if len(rows):
            self._tensors.append(tensor)
            self._masks.append(torch.ones_like(tensor).index_fill_(0, rows.to(tensor.device), 0))

    @torch.no_grad()
    def restore(self) -> None:
        if self._tensors:
            torch._foreach_mul_(self._tensors, self._masks)
            torch._foreach_add_(self._tensors, 0.0)  # a negative weight times 0 is -0.0, which this turns into 0.0


class SoftPruning(PruningSchedule):
    """He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks", IJCAI 2018.

    In the order of its official code, whose norm is `filter-l2`: the filters are chosen when this is made, which is before
    the first step, and anew after every `interval`-th epoch and after `last_epoch`. Each time the convolution's weights (and
    bias) of all others are set to 0, and go on training. Their batch norm is left alone, so that gradients reach a cleared
    filter and it can come back. Make this before the optimizer has momentum: what is left in it would bring every cleared
    filter back, and larger than those that were kept.

    `choose()` gives `kept` from the weights as they are. It must not change anything, random streams that training uses
    included: it is also called for an evaluation between two prunings.
    """

    def __init__(self, model: nn.Module, choose: Callable[[], dict[str, Tensor]], *, interval: int, last_epoch: int):
        if interval < 1:
            raise UserError(f"--prune-interval {interval}: must be 1 epoch or more")
        super().__init__(model)
        self.choose = choose
        self.interval = interval
        self.last_epoch = last_epoch
        self._choose_and_clear()

    def _choose_and_clear(self) -> None:
        self.kept = self.choose()
        self._just_cleared = True
        for layer, pruned in _losses(self.layers, self.kept):
            _clear(layer.own_parameters().values(), pruned)

    def after_step(self) -> None:
        self._just_cleared = False

    def after_epoch(self, epoch: int) -> None:
        if (epoch + 1) % self.interval == 0 or epoch == self.last_epoch:
            self._choose_and_clear()

    @contextmanager
    def shipped(self) -> Iterator[dict[str, Tensor]]:
        """Within it the chosen filters are 0 with their batch norm; afterwards every bit is as before.

        They are the filters that were just cleared, or, on an epoch without pruning, those that would be cleared now.
        """
        # Choosing again right after clearing could differ: FPGM ranks cleared filters as any others.
        kept = self.kept if self._just_cleared else self.choose()
        saved = []
        try:
            for layer, pruned in _losses(self.layers, kept):
                tensors = layer.zeroed().values()
                saved += [(tensor, tensor.detach().clone()) for tensor in tensors]
                _clear(tensors, pruned)
            yield kept
        finally:
            with torch.no_grad():
                for tensor, before in reversed(saved):  # one of two layers may have been cleared by the other already
                    tensor.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"just_cleared": self._just_cleared}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._just_cleared = state["just_cleared"]


def check_soft_state(state: Mapping[str, Any], *, folder: str | os.PathLike) -> None:
    """Raises UserError for the state of a version that cleared BN biases too, and nothing before the first epoch."""
    if "just_cleared" not in state:
        raise UserError(f"--resume {folder}: an older version began it, whose soft pruning was another method; start it anew")


def _losses(
    layers: Mapping[str, PrunableLayer | SharedNorm], kept: Mapping[str, Tensor]
) -> Iterator[tuple[PrunableLayer | SharedNorm, Tensor]]:
    """The layers that lose filters, each with the indices of those that go."""
    for name, indices in kept.items():
        pruned = torch.ones(layers[name].filters, dtype=torch.bool).index_fill_(0, indices, False).nonzero().flatten()
        if len(pruned):
            yield layers[name], pruned


@torch.no_grad()
def _clear(tensors: Iterable[Tensor], pruned: Tensor) -> None:
    for tensor in tensors:
        tensor.index_fill_(0, pruned.to(tensor.device), 0)


def _checked_kept(layers: Mapping[str, PrunableLayer | SharedNorm], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    checked = {}
    for name, indices in kept.items():
        if name not in layers:
            raise UserError(f"kept filters of {name!r}: the network has no such layer: choose from {', '.join(layers)}")
        filters = layers[name].filters
        if any(not 0 <= index < filters for index in indices.tolist()):
            raise UserError(f"kept filters of {name!r}: the network has filters 0 to {filters - 1} there, not {indices.tolist()}")
        checked[name] = indices.to("cpu", torch.int64)
    return checked
