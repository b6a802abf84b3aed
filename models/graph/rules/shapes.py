"""What changes the shape of a tensor."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from models.graph.call import Call, opaque, rule
from models.graph.channels import Channels, Step
from models.graph.rules.pointwise import PRODUCTS
from models.graph.rules.sizes import count_of, is_batch_size


@rule(nn.Flatten, torch.flatten, "flatten")
def _flatten(call: Call) -> Step:
    given = call.channels(call.source)
    if call.node.op == "call_module":
        start, end = call.module.start_dim, call.module.end_dim
    else:
        start, end = call.argument(1, "start_dim", 0), call.argument(2, "end_dim", -1)
    if given is None or given.axis != 1 or given.rank is None:
        return opaque(call)
    start, end = start % given.rank, end % given.rank
    if 1 < start <= end and not given.flat:
        return call.step(replace(given, rank=given.rank - (end - start)))
    return _flattened(call) if (start, end) == (1, given.rank - 1) else opaque(call)


@rule("view", "reshape", torch.reshape)
def _view(call: Call) -> Step:
    """`x.view(x.size(0), -1)` is a flatten; `x.view(batch, channels, ...)` changes the axes behind the channels."""
    given, sizes = call.channels(call.source), sizes_of(call.node)
    if given is None or given.axis != 1 or len(sizes) < 2:
        return opaque(call)
    step = _view_of_batch(call, given, sizes) if is_batch_size(sizes[0]) else None
    return step or _view_by_shapes(call, given)


def _view_of_batch(call: Call, given: Channels, sizes: Sequence[Any]) -> Step | None:
    """What is known without an example, and so holds for every size of images."""
    if len(sizes) == 2 and sizes[1] == -1:
        return _flattened(call)
    is_plain = given.rank is not None and not given.flat and all(size == 1 for size in sizes[2:])
    # An explicit count says that the axes behind the channels have the size 1; -1 could take in their pixels.
    if is_plain and (count_of(call, sizes[1]) == given.full or (sizes[1] == -1 and given.rank == 2)):
        return call.step(replace(given, rank=len(sizes)), form="sized")
    return None


def _view_by_shapes(call: Call, given: Channels) -> Step:
    """What keeps the images apart keeps the channels, where they are an axis of the result or one with all behind them."""
    before, after = call.shape(call.source), call.shape(call.node)
    if before is None or after is None or len(after) < 2 or before[0] != after[0]:
        return opaque(call)
    if len(after) == 2 and (given.flat or math.prod(before[2:]) > 1):
        return call.step(replace(given, rank=2, flat=True), form="flat")
    if after[1] == given.full:
        return call.step(replace(given, rank=len(after), flat=False), form="sized")
    return opaque(call)


@rule(torch.squeeze, "squeeze")
def _squeeze(call: Call) -> Step:
    """Axes of one entry go; which, is known where they are named, or from the shape for the example."""
    given, dims, shape = call.channels(call.source), call.argument(1, "dim"), call.shape(call.source)
    if given is None or given.rank is None or given.flat or shape is None:
        return opaque(call)
    named = range(given.rank) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % given.rank for dim in named if shape[dim] == 1}
    if given.axis in gone or (dims is None and len(given.stored) < 2):  # one channel would be squeezed as well
        return opaque(call)
    return call.step(replace(given, axis=given.axis - sum(dim < given.axis for dim in gone), rank=given.rank - len(gone)))


def _flattened(call: Call) -> Step:
    given = call.channels(call.source)
    return call.step(replace(given, rank=2, flat=given.flat or given.rank != 2)) if given.rank else opaque(call)


@rule("expand")
def _expand(call: Call) -> Step:
    given, sizes = call.channels(call.source), sizes_of(call.node)
    if given is None or given.rank != len(sizes) or given.flat:
        return opaque(call)
    kept = sizes[given.axis] == -1 or count_of(call, sizes[given.axis]) == given.full
    return call.step(given, form="sized") if kept else opaque(call)


@rule("expand_as")
def _expand_as(call: Call) -> Step:
    """The other tensor gives its shape alone, and is brought to the channels of what is expanded, a gate that it is scaled by.

    Where nothing but that product reads the result, it needs no channels that the other tensor has lost.
    """
    source, other = call.node.args[0], call.argument(1, "other")
    given, like = call.channels(source), call.channels(other)
    if given is None or not given.fits(like):
        return opaque(call)
    stored = given.stored
    if all(user.target in PRODUCTS and other in user.all_input_nodes for user in call.node.users):
        stored = tuple(channel for channel in stored if channel in set(like.stored))
    if not stored:
        return opaque(call)
    out = given.storing(stored)
    return call.step(out, wants={source: out, other: like.storing(stored)})


@rule(torch.unsqueeze, "unsqueeze")
def _unsqueeze(call: Call) -> Step:
    given, dim = call.channels(call.source), call.argument(1, "dim")
    if given is None or given.rank is None or given.flat or not isinstance(dim, int):
        return opaque(call)
    before = dim % (given.rank + 1) <= given.axis
    return call.step(replace(given, axis=given.axis + before, rank=given.rank + 1))


def sizes_of(node: fx.Node) -> tuple[Any, ...]:
    """The sizes that a view or an expansion is given, one by one or as a list."""
    sizes = node.args[1:] or tuple(node.kwargs[name] for name in ("size", "shape") if name in node.kwargs)
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes


@rule(torch.permute, "permute")
def _permute(call: Call) -> Step:
    given, dims = call.channels(call.source), call.node.args[1:] or (call.argument(1, "dims"),)
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    if given is None or given.rank is None or not all(isinstance(dim, int) for dim in dims):
        return opaque(call)
    return call.step(replace(given, axis=[dim % given.rank for dim in dims].index(given.axis)))


@rule(torch.transpose, "transpose")
def _transpose(call: Call) -> Step:
    given = call.channels(call.source)
    dims = call.argument(1, "dim0", call.node.kwargs.get("axis0")), call.argument(2, "dim1", call.node.kwargs.get("axis1"))
    if given is None or given.rank is None or not all(isinstance(dim, int) for dim in dims):
        return opaque(call)
    first, second = (dim % given.rank for dim in dims)
    axis = {first: second, second: first}.get(given.axis, given.axis)
    return call.step(replace(given, axis=axis))
