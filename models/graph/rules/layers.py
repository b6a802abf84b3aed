"""Layers with parameters of their own: convolutions, linear layers, batch and group norms, PReLU."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from models.batch_norm import UnevenBatchNorm2d
from models.graph.call import Call, numbered, opaque, rule, through, unshared
from models.graph.channels import Channels, LayerCut, Members, Step, all_channels, members_of_layer
from models.graph.kinds import output_axis


@rule(*numbered("Conv", "ConvTranspose"))
@unshared
def conv(call: Call) -> Step:
    layer, given = call.module, call.channels(call.source)
    rank = layer.weight.dim()
    if output_axis(layer) is None:
        return replace(opaque(call), why_whole="it is transposed, in groups of several channels")
    if given is None:
        given = Channels(layer.in_channels, all_channels(layer.in_channels), 1, rank)
    if given.flat or (given.axis, given.full) != (1, layer.in_channels):
        return opaque(call)
    live = call.outputs_of_layer(given, layer.out_channels)
    if not live:
        return call.step(Channels(layer.out_channels, (), 1, rank, vanished=call.vanishing(given)))
    cut, inputs = _cut_groups(layer, live, given.stored)
    return call.step(
        Channels(layer.out_channels, cut.rows, 1, rank),
        wants={call.source: given.storing(inputs)},
        cut=cut,
        meets=_meetings_of_groups(call.node.target, layer, given.members),
    )


def _meetings_of_groups(name: str, conv: nn.Module, inputs: Members) -> list[tuple[Members, Members]]:
    """What goes together so that all groups of a convolution keep one size: entry by entry, the filters and inputs of each.

    The filters of a depthwise convolution go with the one channel that they read.
    """
    if conv.groups == 1 or not inputs:
        return []
    own = members_of_layer(name, conv.out_channels)
    if conv.groups == conv.in_channels:
        filters = conv.out_channels // conv.groups
        return [(inputs, own[offset::filters]) for offset in range(filters)]
    return [
        (channels[:size], channels[start : start + size])
        for channels, size in ((own, conv.out_channels // conv.groups), (inputs, conv.in_channels // conv.groups))
        for start in range(size, len(channels), size)
    ]


def _cut_groups(conv: nn.Module, live: Sequence[int], stored: Sequence[int]) -> tuple[LayerCut, tuple[int, ...]]:
    """The cut of a convolution and the input channels that it then reads.

    Groups must stay of one size: groups without a live filter go, the others are evened up with their lowest dead filters
    and input channels to the largest of them.
    """
    if conv.groups == 1:
        inputs = tuple(stored) or (0,)
        return LayerCut(tuple(live), (inputs,)), inputs
    filters, reads = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    used = sorted({row // filters for row in live})
    rows = _evened(live, used, filters)
    inputs = _evened(stored, used, reads)
    width = len(inputs) // len(used)
    columns = tuple(tuple(channel % reads for channel in inputs[i : i + width]) for i in range(0, len(inputs), width))
    return LayerCut(rows, columns), inputs


def _evened(channels: Sequence[int], groups: Sequence[int], size: int) -> tuple[int, ...]:
    """Of those `channels` that are in the `groups` of `size`: at least one of each, and as many of each as the largest has."""
    members: dict[int, list[int]] = {group: [] for group in groups}
    for channel in channels:
        if channel // size in members:
            members[channel // size].append(channel)
    count = max(1, *(len(own) for own in members.values()))
    for group, own in members.items():
        spare = sorted({*range(group * size, (group + 1) * size)} - {*own}) if len(own) < count else []
        members[group] = sorted(own + spare[: count - len(own)])
    return tuple(channel for group in groups for channel in members[group])


@rule(nn.Linear)
@unshared
def linear(call: Call) -> Step:
    layer, given = call.module, call.channels(call.source)
    if given is not None and not _last_axis_of(given, layer.in_features):
        given = None
    rows = call.outputs_of_layer(given, layer.out_features)
    axis, rank = (given.rank - 1, given.rank) if given is not None and given.rank else (-1, None)
    if not rows:
        return call.step(Channels(layer.out_features, (), axis, rank, vanished=call.vanishing(given)))
    if given is None:
        inputs, wants = all_channels(layer.in_features), opaque(call).wants
    else:
        want = given if given.stored else given.storing([0])
        pixels = layer.in_features // given.full  # 1 unless the input is flat
        inputs = want.stored
        if pixels > 1:
            inputs = tuple(channel * pixels + pixel for channel in want.stored for pixel in range(pixels))
        wants = {call.source: want}
    cut = LayerCut(rows, (inputs,))
    return call.step(Channels(layer.out_features, rows, axis, rank), wants=wants, cut=cut)


def _last_axis_of(given: Channels, features: int) -> bool:
    if given.flat:
        return features % given.full == 0
    return given.full == features and (given.axis == -1 or given.axis == given.rank - 1)


@rule(*numbered("BatchNorm"), UnevenBatchNorm2d, nn.SyncBatchNorm)
@unshared
def batch_norm(call: Call) -> Step:
    norm, given = call.module, call.channels(call.source)
    if given is None or given.flat or (given.axis, given.full) != (1, norm.num_features):
        return opaque(call)
    rows = call.outputs_of_layer(given, norm.num_features)
    if not rows:
        return call.step(replace(given, stored=(), vanished=call.vanishing(given)))
    out = given.storing(rows)
    return call.step(out, wants={call.source: out}, cut=LayerCut(rows))


@rule(*numbered("InstanceNorm"))
@unshared
def instance_norm(call: Call) -> Step:
    """Ulyanov et al., "Instance Normalization", 2016: by image and channel, so that channels go as in a batch norm."""
    return batch_norm(call) if call.module.affine or call.module.track_running_stats else _by_channel(call)


def _by_channel(call: Call) -> Step:
    given = call.channels(call.source)
    is_map = given is not None and not given.flat and (given.axis, given.full) == (1, call.module.num_features)
    if not is_map:
        return opaque(call)
    return call.step(given, cut=LayerCut(given.stored)) if given.stored else through(call)


@rule(nn.GroupNorm)
@unshared
def group_norm(call: Call) -> Step:
    """Wu and He, "Group Normalization", ECCV 2018: a group goes where all of its channels do, as its mean is one of all."""
    norm, given = call.module, call.channels(call.source)
    if given is None or given.flat or (given.axis, given.full) != (1, norm.num_channels):
        return opaque(call)
    size = norm.num_channels // norm.num_groups
    live = {channel // size for channel in call.outputs_of_layer(given, norm.num_channels)}
    rows = tuple(channel for channel in range(norm.num_channels) if channel // size in live)
    meets = [(given.members[::size], given.members[offset::size]) for offset in range(1, size)]
    if not rows:
        return call.step(replace(given, stored=(), vanished=call.vanishing(given)), meets=meets)
    out = given.storing(rows)
    return call.step(out, wants={call.source: out}, cut=LayerCut(rows), meets=meets)


@rule(nn.PReLU)
@unshared
def _prelu(call: Call) -> Step:
    given = call.channels(call.source)
    if call.module.num_parameters == 1 or given is None or not given.stored:
        return through(call)
    if given.flat or (given.axis, given.full) != (1, call.module.num_parameters):
        return opaque(call)
    return call.step(given, cut=LayerCut(given.stored))
