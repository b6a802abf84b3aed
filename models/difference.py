"""How far two results of networks are apart: tensors, or tuples, lists, mappings and model outputs that hold some.

What is not a number agrees with nothing, itself included: a network that answers NaN, or infinity, proves nothing.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError


class ResultDifference:
    """The largest difference of any two numbers so far, and the largest number that was expected; NaN once there was one."""

    def __init__(self) -> None:
        self.difference = self.largest = 0.0

    def add(self, expected: Any, found: Any) -> None:
        """Takes two more results. Raises UserError where they do not hold tensors of the same shapes in the same places."""
        own, other = dict(tensors_in(expected)), dict(tensors_in(found))
        if _shapes(own) != _shapes(other):
            raise UserError(f"gives {_shapes(other) or 'no tensor'}, expected {_shapes(own) or 'no tensor'}")
        for place, tensor in own.items():
            if tensor.numel():
                self._add(tensor, other[place].to(tensor.device))

    def _add(self, expected: Tensor, found: Tensor) -> None:
        expected, found = (tensor.detach().to(_exact_type(expected, found)) for tensor in (expected, found))
        self.difference = _larger(self.difference, float((expected - found).abs().max()))
        self.largest = _larger(self.largest, float(expected.abs().max()))

    @property
    def relative(self) -> float:
        """The difference in units of the largest number."""
        return self.difference / self.largest if self.largest else self.difference


def tensors_in(result: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a result, each with its place in it, such as `.logits` or `[0]`; empty for a tensor by itself."""
    if isinstance(result, Tensor):
        yield place, result
    elif isinstance(result, Mapping):
        for key, value in result.items():
            yield from tensors_in(value, f"{place}[{key!r}]")
    elif isinstance(result, tuple | list):
        names = getattr(result, "_fields", None)
        for number, value in enumerate(result):
            yield from tensors_in(value, f"{place}.{names[number]}" if names else f"{place}[{number}]")
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        for each in dataclasses.fields(result):
            yield from tensors_in(getattr(result, each.name), f"{place}.{each.name}")


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{place} {tuple(tensor.shape)}".strip() for place, tensor in tensors.items())


def _exact_type(*tensors: Tensor) -> torch.dtype:
    """The type in which a difference is taken: theirs, from float32 on, and float64 for whole numbers."""
    wide = torch.promote_types(*(tensor.dtype for tensor in tensors))
    return torch.promote_types(wide, torch.float32) if wide.is_floating_point or wide.is_complex else torch.float64


def _larger(first: float, second: float) -> float:
    """The larger one; NaN where either is, which `max` may lose."""
    return max(first, second, key=lambda value: (math.isnan(value), value))
