"""The squares of all weights that go with a group of channels: its filters, its batch norms, and what reads it.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, eq. 6: `I_k = sum over the weights w[k] of the group of
||w[k]||_2^2`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.graph.groups import ChannelGroup, deciding_group, filters_read
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
        self.count, self._sides = len(groups), []  # of each side a layer's name, and whether its weight is summed by input
        family = [number for number, alike in enumerate(families) for _ in alike]
        self.register_buffer("family", torch.tensor(family, dtype=torch.int64), persistent=False)
        place = {member: number for number, group in enumerate(groups) for member in (*group.filters, *group.norms)}
        norms = {layer.norm_name: layer.name for layer in layers if layer.norm_name is not None}
        for name, module in graph.network.named_modules():
            if is_linear_map(module):
                self._add(name, [place.get((name, channel)) for channel in range(_outputs(module))], by_input=False)
            elif isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1:
                owner = norms.get(name, name)
                self._add(name, [place.get((owner, channel)) for channel in range(len(module.weight))], by_input=False)
        for name, channels in filters_read(graph).items():
            if _has_columns(graph.network.get_submodule(name)):
                self._add(name, [deciding_group(members, place, groups) for members in channels], by_input=True)

    def _add(self, name: str, numbers: Sequence[int | None], *, by_input: bool) -> None:
        """The groups that one side of a layer's weight goes with, one number an output or input, None without one."""
        if any(number is not None for number in numbers):
            filled = torch.tensor([self.count if number is None else number for number in numbers])
            self.register_buffer(f"numbers_{len(self._sides)}", filled, persistent=False)
            self._sides.append((name, by_input))

    def forward(self, network: nn.Module) -> Tensor:
        total = None
        for index, (name, by_input) in enumerate(self._sides):
            layer, numbers = network.get_submodule(name), getattr(self, f"numbers_{index}")
            squares = _squares(layer, by_input=by_input, count=len(numbers))
            total = squares.new_zeros(self.count + 1) if total is None else total  # the last is of no group
            total = total.index_add(0, numbers.to(squares.device), squares)
        return total[: self.count]


def _outputs(layer: nn.Module) -> int:
    groups, outputs, _ = weight_matrix(layer).shape
    return groups * outputs


def _has_columns(layer: nn.Module) -> bool:
    """Whether it reads channels that its filters do not go with: the filters of a depthwise one go with what they read."""
    return is_linear_map(layer) and not 1 < groups_of(layer) == layer.in_channels


def _squares(layer: nn.Module, *, by_input: bool, count: int) -> Tensor:
    """(count,) of a layer's weight, by output channel or by input channel, one pixel of a flat input after the other."""
    if layer.weight.dim() == 1:
        return layer.weight.square()
    squares = weight_matrix(layer).square()
    return squares.sum(1).reshape(count, -1).sum(1) if by_input else squares.sum(2).flatten()


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
