"""What a flag may be given: kinds of numbers and of texts, each as an argparse type that says what would be right."""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from utils.errors import UserError, shown
from utils.images.spec import MIN_STD, is_mean, is_std
from utils.runs.found import network_in, run_in

# bounds that nothing sensible meets: counts fit into 64 bits, squares of factors into float32
LARGEST_INT, LARGEST_FLOAT, SMALLEST_FLOAT = 2**63 - 1, 1e18, 1e-18
SHOWN_VALUE = 60  # characters of a value in a message


def number(kind: Callable[[str], Any], description: str, accepts: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: a finite `kind` of number that `accepts` holds for, described as `description` in its error.

    Larger ones than LARGEST_INT and LARGEST_FLOAT are refused, whatever `accepts` says.
    """
    largest = LARGEST_INT if kind is int else LARGEST_FLOAT

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:  # of whole numbers of thousands of digits as well
            value = math.nan
        if value != value or not accepts(value):
            raise argparse.ArgumentTypeError(f"{shown(text, SHOWN_VALUE)} is not {description}")
        if value > largest:
            raise argparse.ArgumentTypeError(f"{shown(text, SHOWN_VALUE)} is too large, at most {largest:g} is possible")
        return value

    return parse


positive_int = number(int, "a whole number of 1 or more", lambda value: value >= 1)
non_negative_int = number(int, "a whole number of 0 or more", lambda value: value >= 0)
process_count = number(int, "a whole number from 0 to 1024", lambda value: 0 <= value <= 1024)
positive_float = number(float, f"a number above 0, of {SMALLEST_FLOAT:g} or more", lambda value: value >= SMALLEST_FLOAT)
non_negative_float = number(float, "a number of 0 or more", lambda value: value >= 0)
momentum_value = number(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)
decay_value = number(float, "a decay above 0 and below 1", lambda value: 0 < value < 1)
share_value = number(float, "a share above 0 and below 1", lambda value: 0 < value < 1)
smoothing_value = number(float, "a share from 0 to below 1", lambda value: 0 <= value < 1)
padding_width = number(int, "a whole number from 0 to 32", lambda value: 0 <= value <= 32)
proportion = number(float, "a proportion from 0 to 1", lambda value: 0 <= value <= 1)
keep_proportion = number(float, "a proportion above 0 and at most 1", lambda value: 0 < value <= 1)
channel_mean = number(float, "a mean from 0 to 1, of images scaled to [0, 1]", is_mean)
channel_std = number(float, f"a deviation from {MIN_STD:g} to 1, of images scaled to [0, 1]", is_std)
seed_value = number(int, "a whole number from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)


def checked(check: Callable[[str], None]) -> Callable[[str], str]:
    """An argparse type: a text that `check` raises no UserError for."""

    def parse(text: str) -> str:
        try:
            check(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return parse


def network_path(files: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: a file with a network, or the folder of a run, of which the first of `files` is taken."""
    return _converted(partial(network_in, files=files))


def _converted(convert: Callable[[str], str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        try:
            return convert(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


run_path = _converted(run_in)


def option_kind(default: bool | int | float | None, *, may_be_zero: bool = False) -> dict[str, Any]:
    """How a flag is read whose default is this: a switch, a whole number of 1 or more, or a number above 0, or from 0 on.

    None stands for a whole number that is found out where it is not given.
    """
    if isinstance(default, bool):
        return {"action": "store_true"}
    if default is None or isinstance(default, int):
        return {"type": non_negative_int if may_be_zero else positive_int, "default": default}
    return {"type": non_negative_float if may_be_zero else positive_float, "default": default}
