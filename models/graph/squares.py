"""The squares of all weights that go with a group of channels: its filters, its batch norms, and what reads it.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, eq. 6: `I_k = sum over the weights w[k] of the group of
||w[k]||_2^2`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.graph.channels import Channels, Plan
from models.graph.groups import ChannelGroup, Member, channel_sets, plan_without
from models.graph.layers import PrunableLayer
from models.graph.statistics import groups_of, is_linear_map, weight_matrix

if TYPE_CHECKING:
    from models.graph.channel_graph import ChannelGraph


class GroupSquares(nn.Module):
    """`squares(network)` gives (G,) sums of squares of the network's weights, one a group, of those of `families` in order.

    A column of a layer that reads channels counts where it goes with the group: where every filter that gives the channel is
    in the group. `family` (G,) is the number of the family that a group is of. Another network of the same architecture may
    be given. The sums are differentiable.
    """

    def __init__(self, graph: "ChannelGraph", families: Sequence[Sequence[ChannelGroup]], layers: Sequence[PrunableLayer]):
        super().__init__()
        groups = [group for alike in families for group in alike]
        self.count, self._places = len(groups), {}
        family = [number for number, alike in enumerate(families) for _ in alike]
        self.register_buffer("family", torch.tensor(family, dtype=torch.int64), persistent=False)
        place = {member: number for number, group in enumerate(groups) for member in (*group.filters, *group.norms)}
        norms = {layer.norm_name: layer.name for layer in layers if layer.norm_name is not None}
        for name, module in graph.network.named_modules():
            if is_linear_map(module):
                self._add(name, "outputs", [place.get((name, channel), -1) for channel in range(_outputs(module))])
            elif isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1:
                owner = norms.get(name, name)
                self._add(name, "outputs", [place.get((owner, channel), -1) for channel in range(len(module.weight))])
        for name, numbers in _columns(graph, groups, place):
            self._add(name, "inputs", numbers)

    def _add(self, name: str, side: str, numbers: Sequence[int]) -> None:
        if max(numbers, default=-1) >= 0:
            key, of_none = f"{side}_{len(self._places)}", self.count
            numbers = torch.tensor([number if number >= 0 else of_none for number in numbers])
            self.register_buffer(key, numbers, persistent=False)
            self._places[key] = name

    def forward(self, network: nn.Module) -> Tensor:
        total = None
        for key, name in self._places.items():
            layer, numbers = network.get_submodule(name), getattr(self, key)
            squares = _squares(layer, by_input=key.startswith("inputs"), count=len(numbers))
            total = squares.new_zeros(self.count + 1) if total is None else total
            total = total.index_add(0, numbers.to(squares.device), squares)
        return total[: self.count]


def _outputs(layer: nn.Module) -> int:
    groups, outputs, _ = weight_matrix(layer).shape
    return groups * outputs


def _squares(layer: nn.Module, *, by_input: bool, count: int) -> Tensor:
    """(count,) of a layer's weight, by output channel or by input channel, one pixel of a flat input after the other."""
    if layer.weight.dim() == 1:
        return layer.weight.square()
    squares = weight_matrix(layer).square()
    return squares.sum(1).reshape(count, -1).sum(1) if by_input else squares.sum(2).flatten()


def _columns(graph: "ChannelGraph", groups: Sequence[ChannelGroup], place: dict[Member, int]) -> Iterator[tuple[str, list[int]]]:
    """The layers that read channels, each with the number of the group that each input channel goes with, -1 without one."""
    plan = plan_without(graph, frozenset())
    sets = channel_sets(plan)
    gone_with = [frozenset(group.filters) for group in groups]
    for name, channels in _readers(graph, plan):
        numbers = []
        for member in channels.members or (None,) * channels.full:
            number = place.get(member, -1)
            goes = number >= 0 and sets.get(member, frozenset((member,))) <= gone_with[number]
            numbers.append(number if goes else -1)
        yield name, numbers


def _readers(graph: "ChannelGraph", plan: Plan) -> Iterator[tuple[str, Channels]]:
    """Convolutions and linear layers with the channels that they read; a depthwise one has the channels of what it reads."""
    for node, step in plan.steps.items():
        if node.op != "call_module" or step.cut is None or step.cut.columns is None or not node.all_input_nodes:
            continue
        layer, given = graph.network.get_submodule(node.target), plan.steps[node.all_input_nodes[0]].out
        is_depthwise = groups_of(layer) > 1 and groups_of(layer) == getattr(layer, "in_channels", 0)
        if isinstance(given, Channels) and is_linear_map(layer) and not is_depthwise:
            yield node.target, given


def squares_of_filters(
    graph: "ChannelGraph", families: Sequence[Sequence[ChannelGroup]], layers: Sequence[PrunableLayer]
) -> dict[str, Tensor]:
    """(F,) for each layer: the sum of squares of the group that each filter is of; of one in no group, its own."""
    with torch.no_grad():
        values = GroupSquares(graph, families, layers)(graph.network)
        found = {layer.name: _squares(layer.module, by_input=False, count=layer.filters).double() for layer in layers}
    for number, group in enumerate(group for alike in families for group in alike):
        for name, channel in group.filters:
            found[name][channel] = values[number]
    return found
