"""Concatenations, the pieces that chunk and split give, indexing, and channel shuffles."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.models.shufflenetv2 import channel_shuffle

from models.graph.call import Call, opaque, picks_one, rule
from models.graph.channels import Channels, Step
from models.graph.rules.sizes import counted_channels


@rule(torch.cat, torch.concat)
def _cat(call: Call) -> Step:
    parts, axis = call.argument(0, "tensors"), call.argument(1, "dim", 0)
    channels = [call.channels(part) for part in parts] if isinstance(parts, list | tuple) else [None]
    first = channels[0]
    if any(part is None for part in channels) or first.rank is None:
        return opaque(call)
    if axis % first.rank != first.axis:
        return _cat_of_other_axis(call, parts, channels)
    if any((part.axis, part.rank, part.flat) != (first.axis, first.rank, False) for part in channels):
        return opaque(call)
    stored, members = [], ()
    for part in channels:
        stored += [len(members) + channel for channel in part.stored]
        members += part.members
    vanished = frozenset().union(*(part.vanished for part in channels)) if not stored else frozenset()
    out = replace(first, full=len(members), stored=tuple(stored), vanished=vanished, members=members)
    return call.step(out, form="cat")


def _cat_of_other_axis(call: Call, parts: Sequence[fx.Node], channels: Sequence[Channels]) -> Step:
    """Every part stores what any of them stores."""
    if not all(channels[0].fits(part) for part in channels) or any(not part.stored for part in channels):
        return opaque(call)
    out = channels[0].storing(sorted(set().union(*(part.stored for part in channels))))
    meets = [(out.members, part.members) for part in channels[1:]]
    return call.step(out, wants=dict.fromkeys(parts, out), meets=meets)


@rule(torch.chunk, torch.split, "chunk", "split")
def _pieces(call: Call) -> Step:
    """`chunk` and `split` along the channels. Each piece keeps at least one channel, so that it exists."""
    given, axis = call.channels(call.source), call.argument(2, "dim", 0)
    known = given is not None and given.rank is not None and not given.flat and axis % given.rank == given.axis
    count = call.argument(1, "chunks" if call.node.target in (torch.chunk, "chunk") else "split_size_or_sections")
    if not known or not isinstance(count, int) or any(not picks_one(user) for user in call.node.users):
        return opaque(call)
    size = -(-given.full // count) if call.node.target in (torch.chunk, "chunk") else count
    starts = range(0, given.full, size)
    if not given.stored:
        return call.step(tuple(_piece(given, start, size, stored=()) for start in starts), form="nothing")
    wanted = set(given.stored)
    for start in starts:
        if not wanted.intersection(range(start, start + size)):
            wanted.add(start)
    want = given.storing(sorted(wanted))
    pieces = tuple(_piece(given, start, size, stored=want.stored) for start in starts)
    return call.step(pieces, wants={call.source: want}, form="nothing")


def _piece(given: Channels, start: int, size: int, *, stored: Sequence[int]) -> Channels:
    members = given.members[start : start + size]
    stored = tuple(channel - start for channel in stored if 0 <= channel - start < size)
    return replace(given, full=len(members), stored=stored, members=members)


@rule(operator.getitem)
def _getitem(call: Call) -> Step:
    """A piece of a chunk, a size, or a tensor subsampled along axes other than the channels', or given new ones by None."""
    out, index = call.steps[call.source].out if call.node.all_input_nodes else None, call.node.args[1]
    if isinstance(out, tuple) and isinstance(index, int):
        piece = out[index]
        return call.step(piece, form="piece")
    if not isinstance(out, Channels):
        return call.step(form="copy" if counted_channels(call.steps, call.node) is None else "count")
    index = index if isinstance(index, tuple) else (index,)
    if out.rank is None or not all(_keeps_axis(entry) or entry is None for entry in index):
        return opaque(call)
    old_axes = [place for place, entry in enumerate(index) if entry is not None]
    if len(old_axes) > out.axis and index[old_axes[out.axis]] != slice(None):
        return opaque(call)
    before = old_axes[out.axis] - out.axis if len(old_axes) > out.axis else len(index) - len(old_axes)
    return call.step(replace(out, axis=out.axis + before, rank=out.rank + len(index) - len(old_axes)))


def _keeps_axis(entry: Any) -> bool:
    bounds = (entry.start, entry.stop, entry.step) if isinstance(entry, slice) else (entry,)
    return isinstance(entry, slice) and not any(isinstance(bound, fx.Node) for bound in bounds)


@rule(nn.ChannelShuffle, channel_shuffle, torch.channel_shuffle, F.channel_shuffle)
def _shuffle(call: Call) -> Step:
    """Channel shuffle (Zhang et al., CVPR 2018): channel k of group i becomes channel i of block k."""
    given = call.channels(call.source)
    groups = call.module.groups if call.node.op == "call_module" else call.argument(1, "groups")
    if given is None or given.rank is None or given.flat or given.axis != 1:
        return opaque(call)
    old_channels = torch.arange(given.full).view(groups, -1).t().flatten().tolist()
    shuffled = replace(given, members=tuple(given.members[old] for old in old_channels))
    if given.complete or not given.stored:
        return call.step(shuffled)
    stored = {new: old for new, old in enumerate(old_channels) if old in set(given.stored)}
    return call.step(shuffled.storing(stored), wants={call.source: given.storing(stored.values())}, form="through")
