"""Concatenations, the pieces that chunk and split give, indexing, and channel shuffles."""

import itertools
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

_SIZES = ("split_size_or_sections", "split_size", "split_sections")


@rule(torch.cat, torch.concat, torch.concatenate)
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
    ranges = _ranges(call, given.full) if known else None
    if ranges is None or any(not picks_one(user) for user in call.node.users):
        return opaque(call)
    if not given.stored:
        return call.step(tuple(_piece(given, channels, stored=()) for channels in ranges), form="nothing")
    wanted = set(given.stored).union(channels[0] for channels in ranges if channels and not {*given.stored} & {*channels})
    want = given.storing(sorted(wanted))
    pieces = tuple(_piece(given, channels, stored=want.stored) for channels in ranges)
    return call.step(pieces, wants={call.source: want}, form="nothing")


def _ranges(call: Call, full: int) -> list[range] | None:
    """The channels of each piece, None where they are not known."""
    if call.node.target in (torch.chunk, "chunk"):
        count = call.argument(1, "chunks")
        sizes = -(-full // count) if isinstance(count, int) else None
    else:
        sizes = next((size for name in _SIZES if (size := call.argument(1, name)) is not None), None)
    if isinstance(sizes, int):
        return [range(start, min(start + sizes, full)) for start in range(0, full, sizes)]
    if not isinstance(sizes, list | tuple) or not all(isinstance(size, int) for size in sizes):
        return None
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _piece(given: Channels, channels: Sequence[int], *, stored: Sequence[int]) -> Channels:
    members, places = tuple(given.members[channel] for channel in channels), {*stored}
    stored = tuple(place for place, channel in enumerate(channels) if channel in places)
    return replace(given, full=len(members), stored=stored, members=members)


@rule(operator.getitem)
def _getitem(call: Call) -> Step:
    """A piece of a chunk, a size, or a tensor: some of its channels, less of its other axes, or new ones by None."""
    out, index = call.steps[call.source].out if call.node.all_input_nodes else None, call.node.args[1]
    if isinstance(out, tuple) and isinstance(index, int):
        piece = out[index]
        return call.step(piece, form="piece")
    if not isinstance(out, Channels):
        return call.step(form="copy" if counted_channels(call.steps, call.node) is None else "count")
    index = _without_ellipsis(index if isinstance(index, tuple) else (index,), out.rank)
    if index is None or not all(_is_plain(entry) for entry in index):
        return opaque(call)
    old_axes = [place for place, entry in enumerate(index) if entry is not None]
    own = index[old_axes[out.axis]] if len(old_axes) > out.axis else slice(None)
    before = index[: old_axes[out.axis]] if len(old_axes) > out.axis else index
    if not isinstance(own, slice):
        return opaque(call)
    if own != slice(None):
        return _some_channels(call, out, range(out.full)[own]) if _takes_all_else(index, own) and not out.flat else opaque(call)
    shift = sum(entry is None for entry in before) - sum(isinstance(entry, int) for entry in before)
    rank = out.rank + sum((entry is None) - isinstance(entry, int) for entry in index)
    return call.step(replace(out, axis=out.axis + shift, rank=rank))


def _some_channels(call: Call, given: Channels, channels: range) -> Step:
    """`x[:, start:stop:step]`; it keeps at least one channel, so that it exists."""
    if not given.stored or not channels:
        return opaque(call)
    stored = [channel for channel in given.stored if channel in channels] or [channels[0]]
    piece = _piece(given, channels, stored=stored)
    return call.step(piece, wants={call.source: given.storing(stored)}, form="slice")


def _takes_all_else(index: Sequence[Any], own: slice) -> bool:
    return sum(entry is own for entry in index) == 1 and all(entry is own or entry == slice(None) for entry in index)


def _without_ellipsis(index: tuple[Any, ...], rank: int | None) -> tuple[Any, ...] | None:
    """The index with a slice for each axis that an ellipsis stands for; None where the rank is not known."""
    if rank is None:
        return None
    place = next((place for place, entry in enumerate(index) if entry is Ellipsis), None)
    if place is None:
        return index
    missing = rank - sum(entry is not None and entry is not Ellipsis for entry in index)
    return (*index[:place], *(slice(None),) * missing, *index[place + 1 :])


def _is_plain(entry: Any) -> bool:
    """Whether an entry of an index is a slice of plain numbers, a number or None."""
    bounds = (entry.start, entry.stop, entry.step) if isinstance(entry, slice) else (entry,)
    return all(bound is None or type(bound) is int for bound in bounds)


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
