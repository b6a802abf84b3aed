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
from models.narrow import NarrowNetwork, narrow
from prune.masks import PrunableLayer, prunable_layers
from utils.engine import Hooks
from utils.errors import UserError

SOFT_CRITERIA = ("filter-a", "filter-l2", "filter-gm")
TRAIN_FORMS = ("auto", "compact", "masked")


class PruningSchedule(Hooks):
    """What a trainer calls. `model` is the bare network, on its device; `kept` maps layers to the filters that stay.

    `kept` holds sorted int64 indices on the CPU, and is empty as long as nothing has been chosen.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers = {layer.name: layer for layer in prunable_layers(model)}
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
        names = [(name, layer) for layer in pruned for name in (layer.name, layer.bn_name) if name is not None]
        return {name: kept[layer.name].tolist() for name, layer in names}

    def state_dict(self) -> dict[str, Any]:
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError for layers or filters that the model has not got."""
        self.kept = _checked_kept(self.layers, state["kept"])


class HardPruning(PruningSchedule):
    """One choice before training: pruned filters are exactly 0 from now on, after every step."""

    def __init__(self, model: nn.Module, kept: Mapping[str, Tensor]):
        super().__init__(model)
        self.load_state_dict({"kept": kept})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._parameters, self._masks = [], []
        for layer, pruned in _losses(self.layers, self.kept):
            for parameter in (*_conv_parameters(layer), *_bn_parameters(layer)):
                self._parameters.append(parameter)
                self._masks.append(torch.ones_like(parameter).index_fill_(0, pruned.to(parameter.device), 0))
        self.after_step()

    @torch.no_grad()
    def after_step(self) -> None:
        """Clears what momentum, weight decay and the BN bias' gradient brought back, in a few launches and no sync."""
        if self._parameters:
            torch._foreach_mul_(self._parameters, self._masks)
            torch._foreach_add_(self._parameters, 0.0)  # a negative weight times 0 is -0.0, which this turns into 0.0


class PhysicalPruning(PruningSchedule):
    """One choice before training, and the filters are gone from the network that is trained: nothing is left to be kept at 0.

    It computes what the network of `HardPruning` computes, step by step, up to rounding.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Tensor]):
        super().__init__(model)
        self.kept = HardPruning(model, kept).kept

    def trained_network(self) -> NarrowNetwork:
        network = narrow(self.model, self.live_channels(self.kept))
        quicken_batch_norms(network)
        return network


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
            _clear(_conv_parameters(layer), pruned)

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
                parameters = [*_conv_parameters(layer), *_bn_parameters(layer)]
                saved += [(parameter, parameter.detach().clone()) for parameter in parameters]
                _clear(parameters, pruned)
            yield kept
        finally:
            with torch.no_grad():
                for parameter, before in saved:
                    parameter.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"just_cleared": self._just_cleared}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._just_cleared = state["just_cleared"]


def check_soft_state(state: Mapping[str, Any], *, folder: str | os.PathLike) -> None:
    """Raises UserError for the state of a version that cleared BN biases too, and nothing before the first epoch."""
    if "just_cleared" not in state:
        raise UserError(f"--resume {folder}: an older version began it, whose soft pruning was another method; start it anew")


def build_schedule(
    network: nn.Module,
    choose: Callable[[], dict[str, Tensor]],
    *,
    soft_interval: int | None,
    last_epoch: int,
    small: bool,
    state: Mapping[str, Any] | None = None,
) -> PruningSchedule:
    """What keeps `network` pruned; hard pruning makes its one choice here, or takes it from the state of a resumed run.

    `soft_interval` is the number of epochs between soft prunings, None for hard pruning. That one trains the network without
    the pruned filters where it is `small`; a resumed run goes on with the form that it began with.
    """
    if soft_interval is not None:
        return SoftPruning(network, choose, interval=soft_interval, last_epoch=last_epoch)
    if state is None:
        return (PhysicalPruning if small else HardPruning)(network, choose())
    return (PhysicalPruning if _was_trained_small(state) else HardPruning)(network, state["resume"]["hooks"]["kept"])


def trains_small(form: str, device: torch.device, *, amp: bool, compiled: bool) -> bool:
    """Whether hard pruning trains the small network, for `--train-form` compact, masked or auto: auto is the faster one."""
    faster_small = device.type == "cpu" and not amp and not compiled  # as measured, docs/performance.md
    return form == "compact" or (form == "auto" and faster_small)


def _was_trained_small(state: Mapping[str, Any]) -> bool:
    """Whether the saved state is that of the small network itself, whatever device this goes on with."""
    trained = state["resume"]["objective"]
    return any(trained[f"student.{name}"].shape != tensor.shape for name, tensor in state["state_dict"].items())


def _conv_parameters(layer: PrunableLayer) -> list[Tensor]:
    conv = layer.conv
    return [conv.weight] if conv.bias is None else [conv.weight, conv.bias]


def _bn_parameters(layer: PrunableLayer) -> list[Tensor]:
    """Weight and bias, in this order, or nothing."""
    return [layer.bn.weight, layer.bn.bias] if layer.bn is not None and layer.bn.affine else []


def _losses(layers: Mapping[str, PrunableLayer], kept: Mapping[str, Tensor]) -> Iterator[tuple[PrunableLayer, Tensor]]:
    """The layers that lose filters, each with the indices of those that go."""
    for name, indices in kept.items():
        pruned = torch.ones(layers[name].filters, dtype=torch.bool).index_fill_(0, indices, False).nonzero().flatten()
        if len(pruned):
            yield layers[name], pruned


@torch.no_grad()
def _clear(parameters: list[Tensor], pruned: Tensor) -> None:
    for parameter in parameters:
        parameter.index_fill_(0, pruned.to(parameter.device), 0)


def _checked_kept(layers: Mapping[str, PrunableLayer], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    checked = {}
    for name, indices in kept.items():
        if name not in layers:
            raise UserError(f"kept filters of {name!r}: the network has no such conv layer: choose from {', '.join(layers)}")
        filters = layers[name].filters
        if any(not 0 <= index < filters for index in indices.tolist()):
            raise UserError(f"kept filters of {name!r}: the network has filters 0 to {filters - 1} there, not {indices.tolist()}")
        checked[name] = indices.to("cpu", torch.int64)
    return checked
