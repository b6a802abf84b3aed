"""What reads the size of a tensor.

A narrow network finds the dense one's sizes everywhere but along the channels, whose number is written as what it was.
"""

from collections.abc import Mapping
from typing import Any

from torch import fx

from models.graph.call import Call, opaque, picks_one, rule
from models.graph.channels import Channels, Step


@rule("size")
def _size(call: Call) -> Step:
    given = call.channels(call.source)
    if given is None or given.rank is None:
        return opaque(call)
    entries = call.node.users if _gives_all(call.node) else [call.node]
    axes = [axis_asked_for(entry) for entry in entries]
    if None in axes or (given.flat and any(axis % given.rank == given.axis for _, axis in axes)):
        return opaque(call)
    if counted_channels(call.steps, call.node) is not None:
        return call.step(form="count")
    return call.step(wants={call.source: given if given.stored else given.whole()})


@rule(getattr)
def _getattr(call: Call) -> Step:
    return _size(call) if _gives_all(call.node) else opaque(call)


def axis_asked_for(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The tensor, and the axis of it, that a node gives the size of: `x.size(1)`, or an entry of `x.size()` or `x.shape`."""
    if picks_one(node) and isinstance(node.args[0], fx.Node) and _gives_all(node.args[0]):
        return node.args[0].args[0], node.args[1]
    if node.op == "call_method" and node.target == "size" and not _gives_all(node):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
        return (node.args[0], dim) if isinstance(dim, int) else None
    return None


def _gives_all(node: fx.Node) -> bool:
    """Whether the result is the sizes of all axes."""
    return (node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs) or (
        node.target is getattr and node.args[1] == "shape"
    )


def is_batch_size(value: Any) -> bool:
    asked = axis_asked_for(value) if isinstance(value, fx.Node) else None
    return asked is not None and asked[1] == 0


def count_of(call: Call, size: Any) -> int | None:
    """The number that a size is, where the plan knows it: a plain one, or a count of channels."""
    return counted_channels(call.steps, size) if isinstance(size, fx.Node) else size


def counted_channels(steps: Mapping[fx.Node, Step], node: fx.Node) -> int | None:
    """How many channels the dense network finds where `node` asks for their number; None where it asks for something else."""
    tensor, axis = axis_asked_for(node) or (None, None)
    out = steps[tensor].out if tensor is not None else None
    if not isinstance(out, Channels) or out.rank is None or out.flat:
        return None
    return out.full if axis % out.rank == out.axis else None
