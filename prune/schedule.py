"""When filters are cleared: once and for good (hard pruning), or again and again with regrowth in between (SFP).

A pruned filter is one whose weights, bias, and batch-norm weight and bias are all exactly 0: only then is its output map 0
whatever the input, and the filter can be removed without changing the function. While SFP trains, its cleared filters are
not yet pruned in this sense; the network that it ships is.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.batch_norm import quicken_batch_norms
from models.copies import copied
from models.graph import ChannelGraph
from models.graph.kinds import axis_of
from models.narrow import NarrowNetwork, Selection
from models.narrow.proof import check_equal_training
from models.narrow.selection import tensor_of
from utils.errors import UserError
from utils.training.pruning import Pruning


class PruningSchedule(Pruning):
    """What a trainer calls. `graph` is that of the bare network, on its device; `selection` says which of its channels stay."""

    def __init__(self, graph: ChannelGraph, selection: Selection):
        self.graph, self.model = graph, graph.network
        self.selection = selection

    def trained_network(self) -> nn.Module:
        """The network to train in place of `model`."""
        return self.model

    @contextmanager
    def shipped(self) -> Iterator[Selection]:
        """Within it the model is the pruned network as it is evaluated and saved; gives what stays of that."""
        yield self.selection

    def state_dict(self) -> dict[str, Any]:
        return {"kept": {name: torch.tensor(channels) for name, channels in self.selection.kept.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError for layers or channels that the model has not got."""
        self.prune(Selection(self.graph, state["kept"]))

    def prune(self, selection: Selection) -> None:
        """Goes on with another selection."""
        self.selection = selection


Mend = Callable[[PruningSchedule, nn.Module], None]  # what is pruned, and the network as it was before


class HardPruning(PruningSchedule):
    """One choice before training: pruned filters are exactly 0 from now on, after every step."""

    def __init__(self, graph: ChannelGraph, selection: Selection):
        super().__init__(graph, selection)
        self.prune(selection)

    def prune(self, selection: Selection) -> None:
        super().prune(selection)
        self._zeros = _Zeros()
        for key, rows in selection.zero_rows().items():
            self._zeros.add(tensor_of(self.model, key), rows, axis=axis_of(self.model, key))
        self.clear_pruned()

    def clear_pruned(self) -> None:
        """Clears what momentum, weight decay and the BN bias' gradient brought back, in a few launches and no sync."""
        self._zeros.restore()


class GradualPruning(HardPruning):
    """Filters go in `steps` steps, the first before training, the others after the first epochs. What is gone stays gone.

    `choose_at(step, selection)` gives what stays at a step, counted from 0, of what has stayed so far (None before the first).
    It must not change anything. At the later ones `mend(schedule, unpruned)` is given the network as it was before, and
    `on_choice(schedule, step)` hears of them. With a `selection`, from the state of a resumed run, nothing is chosen here.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        choose_at: Callable[[int, Selection | None], Selection],
        *,
        steps: int,
        on_choice: Callable[["GradualPruning", int], None],
        mend: Mend | None = None,
        selection: Selection | None = None,
    ):
        self._choose_at, self._steps, self._on_choice, self._mend = choose_at, steps, on_choice, mend
        super().__init__(graph, choose_at(0, None) if selection is None else selection)

    def next_network(self, epoch: int) -> None:
        if epoch + 1 < self._steps:
            self._clear_dead_inputs()
            unpruned = copied(self.model) if self._mend is not None else None
            self.prune(self._choose_at(epoch + 1, self.selection))
            if self._mend is not None:
                self._mend(self, unpruned)
            self._on_choice(self, epoch + 1)

    def _clear_dead_inputs(self) -> None:
        """Weights that only read what is gone must not count in the scores of a filter: in the small network there are none."""
        try:
            small = self.selection.shrink()
        except UserError:  # of a network that has no small form they are not known
            return
        self.model.load_state_dict(small.dense_state_dict(idle=self.model.state_dict()))

    def is_finished(self, epoch: int) -> bool:
        return epoch + 2 >= self._steps


class PhysicalPruning(PruningSchedule):
    """One choice before training, and the filters are gone from the network that is trained.

    It computes what the network of `HardPruning` computes, step by step, up to rounding. Filters that could not be cut (of a
    layer that is called twice, or that even up the groups of a convolution) are held at 0. Raises UserError for a network
    that has no narrow form.
    """

    def __init__(self, graph: ChannelGraph, selection: Selection):
        super().__init__(graph, selection)
        self._cut(selection)

    def _cut(self, selection: Selection) -> None:
        self.selection = selection
        self._pruned = selection.zero_rows()
        for key, rows in self._pruned.items():
            _clear(tensor_of(self.model, key), rows, axis=axis_of(self.model, key))
        self._network = selection.shrink()
        quicken_batch_norms(self._network)
        self._zeros = _Zeros()
        for key, pruned in self._pruned.items():
            stored = self._network.stored(key)
            if stored is not None:
                tensor, rows = stored
                places = torch.isin(torch.tensor(rows), pruned).nonzero().flatten()
                self._zeros.add(tensor, places, axis=axis_of(self.model, key))

    def prove(self, images: Tensor) -> None:
        """Raises UserError unless the small network evaluates and trains as the masked one does, on `images` (N, C, H, W)."""
        check_equal_training(self.model, self._network, images, pruned=self._pruned)

    def trained_network(self) -> NarrowNetwork:
        return self._network

    def clear_pruned(self) -> None:
        self._zeros.restore()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"compact": True}


class GradualPhysicalPruning(PhysicalPruning):
    """`GradualPruning` of the same arguments, with the filters gone from the network that is trained: each step cuts a new one.

    The momentum of what stays goes over to it.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        choose_at: Callable[[int, Selection | None], Selection],
        *,
        steps: int,
        on_choice: Callable[[PruningSchedule, int], None],
        mend: Mend | None = None,
        selection: Selection | None = None,
    ):
        self._choose_at, self._steps, self._on_choice, self._mend = choose_at, steps, on_choice, mend
        super().__init__(graph, choose_at(0, None) if selection is None else selection)

    def next_network(self, epoch: int) -> nn.Module | None:
        if epoch + 1 >= self._steps:
            return None
        self.model.load_state_dict(self._network.dense_state_dict(idle=self.model.state_dict()))
        unpruned = copied(self.model) if self._mend is not None else None
        self._cut(self._choose_at(epoch + 1, self.selection))
        if self._mend is not None:
            self._mend(self, unpruned)
        self._on_choice(self, epoch + 1)
        return self._network

    def is_finished(self, epoch: int) -> bool:
        return epoch + 2 >= self._steps

    def carried_over(self, key: str, value: Tensor, *, before: nn.Module) -> Tensor:
        return self._network.narrowed(key, before.widened(key, value))


class _Zeros:
    """Rows of tensors that are set to 0 again and again."""

    def __init__(self):
        self._tensors: list[Tensor] = []
        self._masks: list[Tensor] = []

    def add(self, tensor: Tensor, rows: Tensor, *, axis: int) -> None:
        if len(rows):
            self._tensors.append(tensor)
            self._masks.append(torch.ones_like(tensor).index_fill_(axis, rows.to(tensor.device), 0))

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

    `choose()` gives what stays by the weights as they are. It must not change anything, random streams that training uses
    included: it is also called for an evaluation between two prunings.
    """

    def __init__(self, graph: ChannelGraph, choose: Callable[[], Selection], *, interval: int, last_epoch: int):
        if interval < 1:
            raise UserError(f"interval {interval}: must be 1 epoch or more")
        super().__init__(graph, choose())
        self.choose = choose
        self.interval = interval
        self.last_epoch = last_epoch
        self._clear_chosen()

    def _clear_chosen(self) -> None:
        self._just_cleared = True
        for key, rows in self.selection.zero_rows(norms=False).items():
            _clear(tensor_of(self.model, key), rows, axis=axis_of(self.model, key))

    def after_step(self) -> None:
        self._just_cleared = False

    def next_network(self, epoch: int) -> None:
        if (epoch + 1) % self.interval == 0 or epoch == self.last_epoch:
            self.selection = self.choose()
            self._clear_chosen()

    @contextmanager
    def shipped(self) -> Iterator[Selection]:
        """Within it the chosen filters are 0 with their batch norm; afterwards every bit is as before.

        They are the filters that were just cleared, or, on an epoch without pruning, those that would be cleared now.
        """
        # Choosing again right after clearing could differ: FPGM ranks cleared filters as any others.
        selection = self.selection if self._just_cleared else self.choose()
        saved = []
        try:
            for key, rows in selection.zero_rows().items():
                tensor = tensor_of(self.model, key)
                saved.append((tensor, tensor.detach().clone()))
                _clear(tensor, rows, axis=axis_of(self.model, key))
            yield selection
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


@torch.no_grad()
def _clear(tensor: Tensor, rows: Tensor, *, axis: int) -> None:
    tensor.index_fill_(axis, rows.to(tensor.device), 0)
