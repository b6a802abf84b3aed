"""An argument parser whose errors are one line, and that knows where each flag counts and what functions call it."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from utils.cli.effects import Rule, flag_of
from utils.cli.values import SHOWN_VALUE
from utils.errors import ParameterError, UserError, printable, shown

LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, of what Linux takes
FREE_TEXT_FLAGS = ("--title",)  # become no name


class HelpFormatter(argparse.HelpFormatter):
    """Says each default once, where there is one that the help text does not say itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, []) or action.default is argparse.SUPPRESS or "(default:" in action.help:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {spaced(action.default)})"
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and that knows where each flag counts."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)
        self.rules: list[Rule] = []
        self.completions: list[Callable[[argparse.Namespace], None]] = []  # set the defaults that depend on other flags
        self.checks: dict[str, Callable[[Any], None]] = {}  # of single flags that take long, made once all of them are parsed
        self.parameters: dict[str, str] = {}  # flags by what functions call what they give, where that is another name

    def counts_only(self, *names: str, where: Callable[[argparse.Namespace], bool], only: str) -> None:
        """The flags `names` (as in the namespace) have an effect only `where(args)`; `only` ends the sentence "it counts only".

        Given elsewhere they are refused by `parse_flags`.
        """
        self.rules.append(Rule(frozenset(names), where, only))

    def check(self, args: argparse.Namespace) -> None:
        """Raises UserError for a flag that does not stand `checks`."""
        for name, check in self.checks.items():
            if (value := getattr(args, name)) is not None:
                try:
                    check(value)
                except UserError as error:
                    raise UserError(f"{flag_of(name)}: {error}") from error

    @contextlib.contextmanager
    def naming_flags(self) -> Iterator[None]:
        """Within it an error that names a parameter names the flag that gave it; those that no flag gives keep their names."""
        try:
            yield
        except ParameterError as error:
            name = self.parameters.get(error.parameter, error.parameter)
            if name not in self.names():
                raise
            raise UserError(error.under(flag_of(name))) from error

    def names_in(self, title: str) -> list[str]:
        """The flags of the argument group of this title, as they are called in the namespace."""
        return [name for group in self._action_groups if group.title == title for name in names_of(group)]

    def names(self) -> set[str]:
        """All flags so far, as they are called in the namespace."""
        return {action.dest for action in self._actions} - {"help"}

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As argparse's, for words that a file system, a log and a JSON file can take. Raises UserError for others."""
        words = list(sys.argv[1:] if args is None else args)
        pairs = [_flag_and_value(word, previous) for word, previous in zip(words, ["", *words], strict=False)]
        for flag, value in pairs:
            _check_text(flag, value)
        parsed = super().parse_args(words, namespace)
        for flag, value in pairs:  # afterwards: a long number is no number of its flag, and that says more
            _check_length(flag, value)
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _flag_and_value(word: str, previous: str) -> tuple[str, str]:
    """What a word of a command line gives, and the flag it belongs to as far as that can be seen without the parser."""
    if word.startswith("--") and "=" in word:
        flag, value = word.split("=", 1)
        return flag, value
    return previous if previous.startswith("--") and "=" not in previous else "", word


def _check_text(flag: str, value: str) -> None:
    """Raises UserError for what is no text, which neither a log nor a JSON file could hold."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{_origin(flag, value)}: is no text in UTF-8 without zero bytes")


def _check_length(flag: str, value: str) -> None:
    """Raises UserError for a value that no file system takes as a path."""
    longest = max(len(part) for part in value.encode().split(b"/"))
    if flag not in FREE_TEXT_FLAGS and (longest > LONGEST_NAME or len(value.encode()) > LONGEST_PATH):
        limits = f"{LONGEST_NAME} bytes a name, {LONGEST_PATH} a path"
        raise UserError(f"{_origin(flag, value)}: is too long for a file system, which takes {limits}")


def _origin(flag: str, value: str) -> str:
    return f"{printable(flag, SHOWN_VALUE)} {shown(value, SHOWN_VALUE)}".lstrip()


def names_of(group: argparse._ArgumentGroup) -> list[str]:
    """The flags of an argument group, as they are called in the namespace."""
    return [action.dest for action in group._group_actions]


def counts_in_training(parser: Parser, *names: str) -> None:
    """These flags have no effect where a network is only scored."""
    parser.counts_only(*names, where=lambda args: not args.evaluate, only="where a network is trained, without --evaluate")


def spaced(values: Sequence[object]) -> str:
    """Values as they stand on a command line."""
    return " ".join(map(str, values)) or "none"


def require(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError for a flag that was not given."""
    for name in names:
        if getattr(args, name) is None:
            raise UserError(f"{flag_of(name)} is required")
