"""Sums, differences and products of two tensors."""

import operator
from dataclasses import replace

import torch

from models.channel_flow.call import Call, opaque, rule
from models.channel_flow.channels import Step
from models.channel_flow.rules.pointwise import pointwise

_DIFFERENCES = (operator.sub, torch.sub, "sub")


@rule(operator.add, torch.add, "add", *_DIFFERENCES)
def _sum(call: Call) -> Step:
    """A sum stores what either side stores. The side with fewer channels is added into its places in the other."""
    if len(call.node.args) != 2 or call.node.kwargs or len(call.node.all_input_nodes) < 2:
        return pointwise(call)
    first, second = call.node.args
    left, right = call.channels(first), call.channels(second)
    if left is None or not left.fits(right):
        return opaque(call)
    union = tuple(sorted({*left.stored, *right.stored}))
    out = replace(left, stored=union, vanished=left.vanished | right.vanished if not union else frozenset())
    if call.node.target in _DIFFERENCES:
        return call.step(out, wants={first: out, second: out})
    return call.step(out, wants={first: left, second: right}, form="sum")


@rule(operator.mul, torch.mul, "mul")
def _product(call: Call) -> Step:
    """A product stores what both sides store."""
    if len(call.node.args) != 2 or call.node.kwargs or len(call.node.all_input_nodes) < 2:
        return pointwise(call)
    first, second = call.node.args
    left, right = call.channels(first), call.channels(second)
    if left is None or not left.fits(right):
        return opaque(call)
    if not left.stored or not right.stored:
        return call.step(left if not left.stored else right)
    both = tuple(sorted({*left.stored} & {*right.stored})) or left.stored[:1]
    out = left.storing(both)
    return call.step(out, wants={first: out, second: out})
