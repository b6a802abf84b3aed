"""Graphs and selections made on the spot, for tests that have a network and channels in mind."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from models.graph import ChannelGraph
from models.graph.groups import ChannelGroup
from models.graph.layers import PrunableLayer
from models.narrow import NarrowNetwork, Selection
from prune.schedule import HardPruning, PhysicalPruning

Kept = Mapping[str, Sequence[int] | Tensor]


def selected(model: nn.Module, kept: Kept | Selection, example: Tensor | None = None) -> Selection:
    """The channels `kept` of `model`, norms with them."""
    return kept.on(model) if isinstance(kept, Selection) else Selection(ChannelGraph(model, example), kept)


def narrow(model: nn.Module, kept: Kept, *, wide_sums: bool = False, example: Tensor | None = None) -> NarrowNetwork:
    """What is left of `model` with the channels `kept`, and no more gone than is listed."""
    return Selection.literal(ChannelGraph(model, example), kept).shrink(wide_sums=wide_sums)


def prunable_layers(model: nn.Module, *, linear: bool = False, example: Tensor | None = None) -> list[PrunableLayer]:
    return ChannelGraph(model, example).prunable_layers(linear=linear)


def channel_groups(
    model: nn.Module, layers: Sequence[PrunableLayer], *, example: Tensor | None = None
) -> list[list[ChannelGroup]]:
    return ChannelGraph(model, example).channel_groups(layers)


def hard_pruning(model: nn.Module, kept: Kept | Selection, *, example: Tensor | None = None) -> HardPruning:
    selection = selected(model, kept, example)
    return HardPruning(selection.graph, selection)


def physical_pruning(model: nn.Module, kept: Kept | Selection, *, example: Tensor | None = None) -> PhysicalPruning:
    selection = selected(model, kept, example)
    return PhysicalPruning(selection.graph, selection)
