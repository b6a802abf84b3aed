"""Channels that stay or go together (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023).

Channels that meet position by position, in a sum, a product, a depthwise convolution or the groups of a grouped one, form a
group. Once a group goes as a whole, what it met stores the same channels on every side: nothing has to be laid out anew. What
lays channels out in the dense network still does: a channel shuffle becomes a step that picks those that are left in its order,
and a parameter with a number for each channel gives those of them. The groups are read off the plan of the channel flow
(`models.graph`), in which every tensor says which layers give its channels and every step says which of them meet.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from models.graph.channels import Channels, Plan, all_channels, members_of_layer
from models.graph.layers import PrunableLayer
from models.graph.plan import output_channels

if TYPE_CHECKING:
    from models.graph.channel_graph import ChannelGraph

Member = tuple[str, int]  # a layer's name and one of its output channels


@dataclass(frozen=True)
class ChannelGroup:
    """Filters that stay or go together, and the entries of batch norms that go with them.

    `norms` holds the entries of those batch norms that no single convolution owns: they read a sum or a concatenation.
    """

    filters: tuple[Member, ...]
    norms: tuple[Member, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The convolutions that it has filters of, in the network's order."""
        return tuple(dict.fromkeys(name for name, _ in self.filters))


def channel_groups(graph: "ChannelGraph", layers: Sequence[PrunableLayer]) -> list[list[ChannelGroup]]:
    """The groups of the network that can go, those of the same convolutions in one list, in the network's order.

    Left out is what cannot go without a step that restores it: channels that an operation reads at full width, those that
    meet a channel of anything but `layers`, and the filters of a convolution in groups that reads a tensor of which nothing is
    known, such as a slice. Hidden units of linear layers meet none: each is a group.
    """
    convs = [layer for layer in layers if not layer.is_linear]
    groups, before = _groups(_plan_without(graph, frozenset()), convs), None
    while groups != before:
        blocked = _members_laid_out_anew(_plan_without(graph, _every_second(groups)))
        before, groups = groups, [alike for alike in groups if all(blocked.isdisjoint(group.filters) for group in alike)]
    order = {layer.name: place for place, layer in enumerate(layers)}
    groups += single_groups([layer for layer in layers if layer.is_linear])
    return sorted(groups, key=lambda alike: order[alike[0].layers[0]])


def single_groups(layers: Sequence[PrunableLayer]) -> list[list[ChannelGroup]]:
    """Every filter by itself, for networks whose channels are not coupled, with the depthwise ones that follow it.

    A grouped convolution loses the same filter of every group. One with one filter a group that follows none is left out.
    Filters that a group norm takes together are one group.
    """
    by_name, followers = {layer.name: layer for layer in layers}, {}
    for layer in layers:
        leader = layer
        while leader.follows in by_name:
            leader = by_name[leader.follows]
        followers.setdefault(leader.name, []).append(layer.name)
    families = []
    for layer in (layer for layer in layers if layer.follows not in by_name):
        filters = layer.filters // layer.groups
        starts = range(0, layer.filters, filters)
        if filters > 1 or len(starts) == 1:
            members = [(name, start + i) for name in followers[layer.name] for start in starts for i in range(layer.block)]
            firsts = range(0, filters, layer.block)
            families.append([ChannelGroup(tuple((name, first + offset) for name, offset in members)) for first in firsts])
    return families


def filters_read(graph: "ChannelGraph") -> dict[str, list[frozenset[Member]]]:
    """For each layer that is called once, by its name, the filters that decide on each channel that it reads, in their order.

    Filters that meet in a sum, a product or a depthwise convolution on the way decide together. A layer that reads the input, or
    another tensor of which nothing is known, is left out; no filter at all decides on a channel that is always 0.
    """
    plan = _plan_without(graph, frozenset())
    sets = {member: members for members in map(frozenset, _met(plan).sets()) for member in members}
    times = Counter(step.node.target for step in plan.steps.values() if step.cut is not None)
    read = {}
    for step in plan.steps.values():
        if step.cut is not None and step.cut.columns is not None and times[step.node.target] == 1:
            source = plan.steps[step.node.all_input_nodes[0]].out
            if isinstance(source, Channels):
                read[step.node.target] = [frozenset() if m is None else sets[m] for m in source.members]
    return read


def deciding_group(members: frozenset[Member], place: Mapping[Member, int], groups: Sequence[ChannelGroup]) -> int | None:
    """The number of the group without which a channel is 0 that `members` decide on: of the one that has them all, if any.

    `place` says of each filter which of `groups` it is in.
    """
    number = place.get(next(iter(members))) if members else None
    return number if number is not None and members <= {*groups[number].filters} else None


def _plan_without(graph: "ChannelGraph", removed: frozenset[Member]) -> Plan:
    """The plan of the network without the `removed` filters; a batch norm has the channels that it is given."""

    def live_outputs(name: str, layer: nn.Module, given: Channels | None) -> Sequence[int]:
        if given is not None and not hasattr(layer, "out_channels") and not hasattr(layer, "out_features"):
            return given.stored
        channels = all_channels(output_channels(layer))
        return [channel for channel in channels if (name, channel) not in removed] if removed else channels

    return graph.plan(live_outputs)


def _met(plan: Plan) -> "_Union":
    union = _Union()
    for step in plan.steps.values():
        for members in _members(step.out):
            union.add(members)
        for one, other in step.meets:
            for first, second in zip(one, other, strict=True):
                union.join(first, second)
    return union


def _groups(plan: Plan, layers: Sequence[PrunableLayer]) -> list[list[ChannelGroup]]:
    union = _met(plan)
    filters = {member for layer in layers for member in members_of_layer(layer.name, layer.filters)}
    norms = _entries_of_norms(plan, union, owned={layer.norm_name for layer in layers})
    order = {layer.name: place for place, layer in enumerate(layers)}
    whole = [sorted(members, key=lambda member: (order[member[0]], member[1])) for members in union.sets() if members <= filters]
    return _by_layers(
        ChannelGroup(tuple(members), tuple(norms.get(union.root(members[0]), ())))
        for members in sorted(whole, key=lambda members: (order[members[0][0]], members[0][1]))
    )


def _members(out: Channels | tuple | None) -> Iterable[tuple[Member | None, ...]]:
    return [each.members for each in (out if isinstance(out, tuple) else (out,)) if isinstance(each, Channels)]


def _entries_of_norms(plan: Plan, union: "_Union", *, owned: set[str | None]) -> dict[Member, list[Member]]:
    """The entries of batch norms that are not `owned`, by the root of the group that they read."""
    entries: dict[Member, list[Member]] = {}
    for step in plan.steps.values():
        is_norm = step.cut is not None and step.cut.columns is None and step.node.target not in owned
        if is_norm:
            own = members_of_layer(step.node.target, step.out.full)
            for entry, member in zip(own, step.out.members, strict=True):
                if member is not None:
                    entries.setdefault(union.root(member), []).append(entry)
    return entries


def _by_layers(groups: Iterable[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Groups of the same convolutions together."""
    alike: dict[tuple[str, ...], list[ChannelGroup]] = {}
    for group in groups:
        alike.setdefault(group.layers, []).append(group)
    return list(alike.values())


def _every_second(groups: Sequence[Sequence[ChannelGroup]]) -> frozenset[Member]:
    return frozenset(member for alike in groups for group in alike[1::2] for member in group.filters)


def _members_laid_out_anew(plan: Plan) -> set[Member]:
    """The channels that one step stores and the next does not want, or the other way round.

    A convolution in groups may want some channels of a tensor of which nothing is known: then those are its own filters.
    """
    blocked: set[Member] = set()
    for step in plan.steps.values():
        for source, want in step.wants.items():
            out = plan.steps[source].out
            if isinstance(out, Channels):
                unread = set() if step.form == "slice" else set(out.stored) - set(want.stored)
                blocked |= {out.members[channel] for channel in unread | set(want.stored) - set(out.stored)} - {None}
            elif step.cut is not None and (len(step.cut.columns) > 1 or not want.complete):
                blocked |= set(step.out.members)
    return blocked


class _Union:
    """Disjoint sets."""

    def __init__(self):
        self._parents: dict[Member, Member] = {}

    def add(self, members: Iterable[Member | None]) -> None:
        for member in members:
            if member is not None:
                self._parents.setdefault(member, member)

    def root(self, member: Member) -> Member:
        while self._parents[member] != member:
            self._parents[member] = self._parents[self._parents[member]]
            member = self._parents[member]
        return member

    def join(self, first: Member | None, second: Member | None) -> None:
        if first is not None and second is not None:
            self.add((first, second))
            self._parents[self.root(second)] = self.root(first)

    def sets(self) -> list[set[Member]]:
        found: dict[Member, set[Member]] = {}
        for member in self._parents:
            found.setdefault(self.root(member), set()).add(member)
        return list(found.values())
