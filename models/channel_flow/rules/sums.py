"""Sums, differences and products of two tensors."""

import operator
from dataclasses import replace

import torch

from models.channel_flow.call import Call, opaque, rule
from models.channel_flow.channels import Step
from models.channel_flow.rules.pointwise import PRODUCTS, pointwise

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
    members = tuple(mine or other for mine, other in zip(left.members, right.members, strict=True))
    step = call.step(replace(out, members=members), wants={first: out, second: out}, meets=[(left.members, right.members)])
    if call.node.target not in _DIFFERENCES:
        step.wants, step.form = {first: left, second: right}, "sum"
    return step


@rule(*PRODUCTS)
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
    return call.step(out, wants={first: out, second: out}, meets=[(left.members, right.members)])
