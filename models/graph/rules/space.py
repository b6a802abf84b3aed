"""Pooling, padding and means: what works on the axes behind the channels."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from models.graph.call import Call, numbered, opaque, rule
from models.graph.channels import Step


@rule(
    *numbered("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool"),
    *(*numbered("ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad"), nn.Upsample),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.max_pool2d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
)
def spatial(call: Call) -> Step:
    """Pooling and the like, which work on the axes behind the channels, each channel by itself."""
    given = call.channels(call.source)
    with_indices = call.node.kwargs.get("return_indices") or (
        call.node.op == "call_module" and getattr(call.module, "return_indices", False)
    )
    known = given is not None and given.rank is not None and given.axis == 1 and not given.flat
    return call.step(given) if known and not with_indices and _leaves_channels(call, given.rank) else opaque(call)


def _leaves_channels(call: Call, rank: int) -> bool:
    """Whether the axes that the operation works on lie behind the channels: given one axis less, pooling takes (C, H, W)."""
    name = type(call.module).__name__ if call.node.op == "call_module" else call.node.target.__name__
    digits = [int(letter) for letter in name if letter.isdigit()]
    return rank == digits[0] + 2 if digits else rank > 2


@rule(F.pad)
def _pad(call: Call) -> Step:
    """Zero padding in space changes no channel; behind or before the channels it adds some that need not be stored."""
    given, widths = call.channels(call.source), call.argument(1, "pad")
    mode, value = call.argument(2, "mode", "constant"), call.argument(3, "value")
    if given is None or given.rank is None or given.flat or not isinstance(widths, list | tuple):
        return opaque(call)
    if mode == "constant" and value not in (None, 0):
        return opaque(call)
    position = 2 * (given.rank - 1 - given.axis)  # of the channels' own pair: pairs count from the last axis
    before, after = widths[position : position + 2] if len(widths) > position else (0, 0)
    if not isinstance(before, int) or not isinstance(after, int):
        return opaque(call)
    if before == after == 0:
        return call.step(given)
    if mode != "constant" or min(before, after) < 0:
        return opaque(call)
    stored = tuple(channel + before for channel in given.stored)
    members = (None,) * before + given.members + (None,) * after
    return call.step(replace(given, full=len(members), stored=stored, members=members), form="pad")


@rule(torch.mean, torch.sum, torch.amax, "mean", "sum", "amax")
def _reduce(call: Call) -> Step:
    """Mean, sum or maximum over axes other than the channels'."""
    given, dims = call.channels(call.source), call.argument(1, "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if given is None or given.rank is None or not dims or not all(isinstance(dim, int) for dim in dims):
        return opaque(call)
    gone = {dim % given.rank for dim in dims}
    if given.axis in gone:
        return opaque(call)
    if call.argument(2, "keepdim", False):
        return call.step(given)
    axis = given.axis - sum(dim < given.axis for dim in gone)
    return call.step(replace(given, axis=axis, rank=given.rank - len(gone)))
