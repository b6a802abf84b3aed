"""What changes the shape of a tensor, or reads it."""

import operator
from dataclasses import replace

import torch
from torch import fx, nn

from models.channel_flow.call import Call, opaque, rule
from models.channel_flow.channels import Step
from models.channel_flow.rules.pieces import picks_one


@rule(nn.Flatten, torch.flatten, "flatten")
def _flatten(call: Call) -> Step:
    given = call.channels(call.source)
    if call.node.op == "call_module":
        start, end = call.module.start_dim, call.module.end_dim
    else:
        start, end = call.argument(1, "start_dim", 0), call.argument(2, "end_dim", -1)
    return _flattened(call) if given is not None and given.axis == 1 and (start, end) == (1, -1) else opaque(call)


@rule("view", "reshape", torch.reshape)
def _view(call: Call) -> Step:
    """`x.view(x.size(0), -1)` is a flatten."""
    given, sizes = call.channels(call.source), call.node.args[1:]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    batch_first = len(sizes) == 2 and sizes[1] == -1 and isinstance(sizes[0], fx.Node) and _is_batch_size(sizes[0])
    return _flattened(call) if given is not None and given.axis == 1 and batch_first else opaque(call)


def _flattened(call: Call) -> Step:
    given = call.channels(call.source)
    return call.step(replace(given, rank=2, flat=given.flat or given.rank != 2)) if given.rank else opaque(call)


def _is_batch_size(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    return node.target is operator.getitem and node.args[1] == 0 and _reads_size(node.args[0])


def _reads_size(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target == "size" and len(node.args) == 1) or (
        node.target is getattr and node.args[1] == "shape"
    )


@rule("size")
def _size(call: Call) -> Step:
    """Sizes are read at full width unless it is clear that only other axes than the channels' are asked for."""
    given = call.channels(call.source)
    if given is None or given.rank is None:
        return opaque(call)
    if _reads_size(call.node):
        asked = [user.args[1] if picks_one(user) else None for user in call.node.users]
    else:
        asked = [call.argument(1, "dim")]
    other_axes = all(isinstance(dim, int) and dim % given.rank != given.axis for dim in asked)
    return (
        call.step(None, wants={call.source: given} if given.stored else {call.source: given.whole()})
        if other_axes
        else opaque(call)
    )


@rule(getattr)
def _getattr(call: Call) -> Step:
    return _size(call) if _reads_size(call.node) else opaque(call)


@rule(torch.permute, "permute")
def _permute(call: Call) -> Step:
    given, dims = call.channels(call.source), call.node.args[1:]
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    if given is None or given.rank is None or not all(isinstance(dim, int) for dim in dims):
        return opaque(call)
    return call.step(replace(given, axis=[dim % given.rank for dim in dims].index(given.axis)))


@rule(torch.transpose, "transpose")
def _transpose(call: Call) -> Step:
    given, dims = call.channels(call.source), call.node.args[1:3]
    if given is None or given.rank is None or len(dims) != 2 or not all(isinstance(dim, int) for dim in dims):
        return opaque(call)
    first, second = (dim % given.rank for dim in dims)
    axis = {first: second, second: first}.get(given.axis, given.axis)
    return call.step(replace(given, axis=axis))
