"""The flags that a run's config.json records, taken over when it is resumed as far as somebody else's file may be trusted.

What they can decide is how the run is computed and which files it reads; never where anything is written, and never
another action than to go on with the run.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from utils.errors import UserError, shown

# save_dir and run_name are recorded as well, but a resumed run writes into its folder wherever that lies by now
UNTAKEN_FLAGS = frozenset(
    ("help", "config", "resume", "auto_resume", "accept_data", "dry_run", "evaluate", "inspect", "decode", "output", "force")
)


def recorded_words(parser: argparse.ArgumentParser, flags: Mapping[str, Any]) -> list[str]:
    """The command line that gives `parser` the recorded `flags`, without those that are never taken over.

    Raises UserError for a name that is no flag and for a value that no flag has.
    """
    known = {action.dest for action in parser._actions}
    words = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if name in UNTAKEN_FLAGS or value is None or value is False:
            continue
        if name not in known:
            raise UserError(f"unrecognized arguments: {shown(f'{flag}={value}')[1:-1]}")
        if isinstance(value, list):
            _check_items(value, flag)
            words += [flag, *map(str, value)] if value != parser.get_default(name) else []
        elif isinstance(value, str | int | float):
            is_default = value == parser.get_default(name)  # which need not be among what can be typed
            words += [] if is_default else [flag if value is True else f"{flag}={value}"]
        else:
            raise UserError(f"{flag}: {shown(value)} is no value of a flag")
    return words


def _check_items(items: list[Any], flag: str) -> None:
    """Raises UserError for a nested item, and for one that the parser would take for another flag."""
    for item in items:
        if not isinstance(item, str | int | float) or (isinstance(item, str) and item.startswith("-")):
            raise UserError(f"{flag}: {shown(item)} is no value of a flag")
