"""Which flags in a run's config.json a report computes with, and what they must be: others may have written the file."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from utils.errors import UserError, shown

MAX_FLAGS = 300
MAX_SEED = 2**63


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raises UserError, naming the flag, for a value that no entry script writes and that a report would stumble over."""
    if len(flags) > MAX_FLAGS:
        raise UserError(f"it has {len(flags)} flags, more than {MAX_FLAGS}")
    for name, is_right in CHECKS.items():
        if name in flags and not is_right(flags[name]):
            raise UserError(f"its flag {name} is {shown(flags[name])}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e300


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_SEED


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_file(value: Any) -> bool:
    return _are(_is_text)(value) and len(value) == 1


CHECKS: dict[str, Callable[[Any], bool]] = {
    "seed": _is_whole,
    "n_epochs": _is_whole,
    "channel_multiple": _or_none(lambda value: _is_whole(value) or value == "auto"),
    "hap_ts": _or_none(_is_whole),
    "samp_batches": _or_none(_is_whole),
    "alpha": _or_none(_is_number),
    "gamma": _or_none(_is_number),
    "prune_rates": _or_none(lambda value: (_are(_is_number)(value) and value) or _is_file(value)),
    "betas": _or_none(_are(_is_number)),
    "distill": _or_none(_are(_is_text)),
    **dict.fromkeys(("prune_mode", "budget", "allocation", "model", "s_model", "t_model", "data_dir"), _or_none(_is_text)),
    **dict.fromkeys(("dataset", "quan_mode"), _is_text),
}
