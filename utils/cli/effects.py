"""Which flags count beside which others: one that is given and would have no effect is refused by its name, never ignored.

A rule asks what stands on the command line, not what differs from a default, so a default that is typed is refused as well,
and the flags of a resumed run's config.json, which nobody typed, are not.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError


@dataclass(frozen=True)
class Rule:
    """`names`, as they are called in the namespace, have an effect where `where(args)`; `only` says in words where that is."""

    names: frozenset[str]
    where: Callable[[argparse.Namespace], bool]
    only: str


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that stand in `argv` (None: on the command line), by their names in the namespace."""
    absent = object()
    names = [action.dest for action in parser._actions]
    flags = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent))))
    return {name: value for name, value in flags.items() if name in names and value is not absent}


def check_effects(rules: Sequence[Rule], args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Raises UserError for the first of the `given` flags that a rule leaves without any effect beside the others of `args`."""
    for name, value in given.items():
        for rule in rules:
            if name in rule.names and not rule.where(args):
                raise UserError(f"{typed(name, value)}: only {rule.only}; here it has no effect")


def flag_of(name: str) -> str:
    """A flag as it is typed, of the name that it has in the namespace."""
    return f"--{name.replace('_', '-')}"


def typed(name: str, value: Any) -> str:
    """A flag and its value as they stand on a command line: `--betas 50 3`, `--amp`."""
    if isinstance(value, bool):
        return flag_of(name)
    values = value if isinstance(value, list) else [value]
    return " ".join([flag_of(name), *(str(each).removesuffix(".0") for each in values)])
