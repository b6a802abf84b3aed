"""Sums, differences and products of two tensors."""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from models.graph.call import Call, entrywise, opaque, rule
from models.graph.channels import Channels, Step
from models.graph.concrete import attribute
from models.graph.rules.pointwise import PRODUCTS, pointwise
from models.graph.tracing import is_mode

_DIFFERENCES = (operator.sub, torch.sub, "sub")


@rule(operator.add, torch.add, "add", *_DIFFERENCES)
@entrywise
def _sum(call: Call) -> Step:
    """A sum stores what either side stores. The side with fewer channels is added into its places in the other."""
    operands = _operands(call)
    if operands is None:
        return pointwise(call)
    first, second = operands
    left, right = call.channels(first), call.channels(second)
    if left is None or not left.fits(right):
        return opaque(call)
    union = tuple(sorted({*left.stored, *right.stored}))
    out = replace(left, stored=union, vanished=left.vanished | right.vanished if not union else frozenset())
    members = tuple(mine or other for mine, other in zip(left.members, right.members, strict=True))
    step = call.step(replace(out, members=members), wants={first: out, second: out}, meets=[(left.members, right.members)])
    if call.node.target not in _DIFFERENCES:
        step.wants, step.form = {first: left, second: right}, "sum"
    return step


def _operands(call: Call) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors of the operation, None where it has another form."""
    first, second = call.argument(0, "input"), call.argument(1, "other")
    are_nodes = isinstance(first, fx.Node) and isinstance(second, fx.Node)
    is_plain = len(call.node.args) + len(call.node.kwargs) == 2
    return (first, second) if are_nodes and is_plain and first is not second else None


def _scaled(call: Call, source: fx.Node, given: Channels, factor: fx.Node) -> Step:
    """A product with a parameter, or a quotient by one. Of numbers for each channel some are left, others stay as they are.

    LayerScale (Touvron et al., ICCV 2021) has a number for each channel, ReZero (Bachlechner et al., UAI 2021) one.
    """
    shape = _parameter_shape(call, factor)
    behind = given.rank - given.axis if given.rank is not None else 1 if given.axis == -1 else None
    if shape is None or behind is None or len(shape) > (given.rank or behind):
        return opaque(call)
    axis = len(shape) - behind
    if axis < 0 or shape[axis] == 1:
        return call.step(given)
    if given.flat or shape[axis] != given.full:
        return opaque(call)
    if given.complete or not given.stored:
        return call.step(given)
    return call.step(given, wants={source: given, factor: Channels(given.full, given.stored, axis, len(shape))})


def _parameter_shape(call: Call, node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a parameter or buffer, or of one that is given other axes: by view, unsqueeze, or None as an index."""
    if node.op == "get_attr" and not is_mode(node):
        return tuple(attribute(call.model, node.target).shape)
    is_view = node.op == "call_method" and node.target in ("view", "reshape", "unsqueeze")
    if not is_view and not (node.target is operator.getitem and _adds_axes(node.args[1])):
        return None
    shape = _parameter_shape(call, node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if shape is None or node.kwargs or any(isinstance(source, fx.Node) for source in node.all_input_nodes[1:]):
        return None
    tensor, *options = torch.empty(shape, device="meta"), *node.args[1:]
    return tuple((getattr(tensor, node.target)(*options) if is_view else tensor[options[0]]).shape)


def _adds_axes(index: Any) -> bool:
    entries = index if isinstance(index, tuple) else (index,)
    return all(entry in (None, slice(None), Ellipsis) for entry in entries)


@rule(*PRODUCTS)
@entrywise
def _product(call: Call) -> Step:
    """A product stores what both sides store."""
    operands = _operands(call)
    if operands is None:
        return pointwise(call)
    first, second = operands
    left, right = call.channels(first), call.channels(second)
    if (left is None) != (right is None):
        return _scaled(call, *((first, left, second) if right is None else (second, right, first)))
    if left is None or not left.fits(right):
        return opaque(call)
    if not left.stored or not right.stored:
        return call.step(left if not left.stored else right)
    both = tuple(sorted({*left.stored} & {*right.stored})) or left.stored[:1]
    out = left.storing(both)
    return call.step(out, wants={first: out, second: out}, meets=[(left.members, right.members)])


@rule(operator.truediv, torch.div, "div")
@entrywise
def _quotient(call: Call) -> Step:
    """What divides a tensor may have a number for each channel; a quotient of two maps is 0 / 0 where a channel is gone."""
    operands = _operands(call)
    if operands is None:
        return pointwise(call)
    given = call.channels(operands[0])
    if given is None or call.channels(operands[1]) is not None:
        return opaque(call)
    return _scaled(call, operands[0], given, operands[1])
