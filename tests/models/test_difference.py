"""Two results agree only where every number of both is one, and in the same place."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from models.difference import ResultDifference
from utils.errors import UserError

NAN, INFINITY = float("nan"), float("inf")


def difference(*pairs) -> ResultDifference:
    found = ResultDifference()
    for pair in pairs:
        found.add(*pair)
    return found


def test_by_hand():
    found = difference((torch.tensor([1.0, -8.0]), torch.tensor([1.5, -7.0])), (torch.tensor([2.0]), torch.tensor([2.0])))
    assert (found.difference, found.largest, found.relative) == (1.0, 8.0, 0.125)


def test_beside_zeros_the_difference_is_absolute():
    assert difference((torch.zeros(2), torch.tensor([0.0, 0.5]))).relative == 0.5


@pytest.mark.parametrize("number", [NAN, INFINITY])
@pytest.mark.parametrize("sides", ["expected", "found", "both"])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_number_never_agrees(number, sides, place):
    expected, found = torch.ones(2), torch.ones(2)
    for side, tensor in {"expected": expected, "found": found}.items():
        if sides in (side, "both"):
            tensor[place] = number
    fine = torch.ones(1), torch.ones(1)
    for pairs in ([(expected, found), fine], [fine, (expected, found)]):
        assert not difference(*pairs).relative <= 1e9


class Named(NamedTuple):
    logits: Tensor
    maps: tuple[Tensor, ...]


@dataclass
class ModelOutput:
    logits: Tensor
    hidden: Tensor | None = None


class Ordered(OrderedDict):
    """As the outputs of transformers, which torch's pytrees do not know."""


STRUCTURES = {
    "tuple": lambda x: (x, [x, x]),
    "named tuple": lambda x: Named(x, (x,)),
    "mapping": lambda x: {"logits": x, "more": {"hidden": x}},
    "model output": lambda x: ModelOutput(x),
    "subclass of a mapping": lambda x: Ordered(logits=x),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_tensor_of_a_structure_counts(name):
    build = STRUCTURES[name]
    assert difference((build(torch.ones(2)), build(torch.ones(2)))).relative == 0
    assert difference((build(torch.ones(2)), build(torch.tensor([1.0, 3.0])))).relative == 2
    assert not difference((build(torch.ones(2)), build(torch.tensor([1.0, NAN])))).relative <= 1
    with pytest.raises(UserError, match=r"gives .*\(3,\)"):
        difference((build(torch.ones(2)), build(torch.ones(3))))


def test_results_that_hold_something_else_are_refused():
    with pytest.raises(UserError, match=r"gives \[0\] \(2,\), expected \(2,\)"):
        difference((torch.ones(2), (torch.ones(2),)))


def test_whole_numbers_and_low_precision_are_not_wrapped_or_rounded():
    assert difference((torch.tensor([0], dtype=torch.uint8), torch.tensor([1], dtype=torch.uint8))).difference == 1
    assert difference((torch.tensor([1.0]).bfloat16(), torch.tensor([1.001]))).difference == pytest.approx(1e-3, rel=1e-3)
