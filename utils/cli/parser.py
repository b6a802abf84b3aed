"""An argument parser whose errors are one line, and that knows where each flag counts and what functions call it."""

import argparse
import contextlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from utils.cli.effects import Rule, flag_of
from utils.cli.values import SHOWN_VALUE
from utils.errors import ParameterError, UserError, printable, shown
from utils.python_file import check_function, names_function
from utils.version import version_line

LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, of what Linux takes
NEAR = 0.75  # how alike a flag must be to be taken for a mistyped one
FREE_TEXT_FLAGS = ("--title",)  # become no name


class HelpFormatter(argparse.HelpFormatter):
    """Says each default once, where there is one that the help text does not say itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, []) or action.default is argparse.SUPPRESS or "(default:" in action.help:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {spaced(action.default)})"
        return f"{action.help} (default: %(default)s)"


class _Print(argparse.Action):
    """A flag that prints a text and ends the process. All of them share the name `help`, which no run records."""

    def __init__(self, option_strings: Sequence[str], *, text: Callable[[], str], help: str, **_: Any):
        super().__init__(option_strings, dest="help", default=argparse.SUPPRESS, nargs=0, help=help)
        self.text = text

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(self.text().rstrip())
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and that knows where each flag counts.

    `--help` shows everything, unless `leads_with` says what comes first: then it is that, and `--help-all` shows the rest.
    """

    def __init__(self, **options: Any):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, add_help=False, **options)
        self.first: Sequence[str] = ()
        self.lists: dict[str, Sequence[tuple[str, str]]] = {}
        self.spellings: dict[str, Mapping[str, str]] = {}  # of flags by name: other words for their choices
        self.own_code: set[str] = set()  # flags that take FILE.py:NAME beside their choices
        self.add_argument("-h", "--help", action=_Print, text=self.short_help, help="show this help and exit")
        self.add_argument("--version", action=_Print, text=lambda: version_line(self.prog), help="show the version and exit")
        self.rules: list[Rule] = []
        self.completions: list[Callable[[argparse.Namespace], None]] = []  # set the defaults that depend on other flags
        self.checks: dict[str, Callable[[Any], None]] = {}  # of single flags that take long, made once all of them are parsed
        self.derived: frozenset[str] = frozenset()  # flags whose defaults follow from others
        self.parameters: dict[str, str] = {}  # flags by what functions call what they give, where that is another name

    def leads_with(self, *names: str, lists: Mapping[str, Sequence[tuple[str, str]]] | None = None) -> None:
        """`--help` begins with the flags `names`, as in the namespace, in this order.

        `lists` follow, by title: what can be given, each with a line that says what it is. Only the names of other flags come
        after them. Called once all flags are there.
        """
        self.first, self.lists = names, lists or {}
        self.add_argument("--help-all", action=_Print, text=self.format_help, help="explain every flag and exit")

    def short_help(self) -> str:
        """What `--help` prints."""
        if not self.first:
            return self.format_help()
        actions = {action.dest: action for action in self._actions}
        formatter = self._get_formatter()
        formatter.add_usage(f"{self.prog} FLAG VALUE ...", (), ())
        formatter.add_text(self.description)
        formatter.start_section("flags to begin with")
        formatter.add_arguments([actions[name] for name in self.first])
        formatter.end_section()
        parts = [formatter.format_help()]
        parts += [f"{title}:\n{_columns(entries)}" for title, entries in self.lists.items()]
        return "\n".join([*parts, f"other flags, all explained by --help-all:\n{self._other_flags()}"])

    def _other_flags(self) -> str:
        """The names of the flags that `--help` does not explain, a paragraph a group."""
        width, lines = shutil.get_terminal_size().columns - 2, []
        for group in self._action_groups:
            flags = [action.option_strings[-1] for action in group._group_actions if action.option_strings]
            flags = [flag for flag in flags if flag.removeprefix("--").replace("-", "_") not in self.first]
            title = "general" if group.title in ("options", "optional arguments") else group.title
            lines += textwrap.wrap(" ".join([f"{title}:", *flags]), width, **_PARAGRAPH) if flags else []
        return "\n".join(lines)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, with the nearest choices for a mistyped one."""
        if action.choices is None or value in action.choices:
            return
        if action.dest in self.own_code and names_function(value):
            return _checked_code(action, value)
        choices = [*self.spellings.get(action.dest, {}), *map(str, action.choices)]
        near = get_close_matches(str(value), choices, n=2)
        meant = f", did you mean {' or '.join(near)}?" if near else ""
        known = ", ".join(self.spellings.get(action.dest, {})) or ", ".join(map(str, action.choices))
        raise argparse.ArgumentError(action, f"invalid choice: {shown(value, SHOWN_VALUE)}{meant} (choose from {known})")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        value = super()._get_value(action, text)
        return self.spellings.get(action.dest, {}).get(value, value)

    def nearest_flags(self, words: Sequence[str]) -> str:
        """What a word that is no flag may have been meant for, as the end of a message."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        mistyped = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
        near = get_close_matches(mistyped, flags, n=2, cutoff=NEAR)
        return f"; did you mean {' or '.join(near)}?" if near else ""

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
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            raise UserError(f"unrecognized arguments: {printable(' '.join(unknown))}{self.nearest_flags(unknown)}")
        for flag, value in pairs:  # afterwards: a long number is no number of its flag, and that says more
            _check_length(flag, value)
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _checked_code(action: argparse.Action, name: str) -> None:
    try:
        check_function(name)
    except UserError as error:
        raise argparse.ArgumentError(action, str(error)) from error


def _columns(entries: Sequence[tuple[str, str]]) -> str:
    """Names and what is said of each, a line each."""
    width = max(len(name) for name, _ in entries)
    return "".join(f"  {name:{width}}  {text}\n" for name, text in entries)


_PARAGRAPH = {"initial_indent": "  ", "subsequent_indent": "    ", "break_on_hyphens": False, "break_long_words": False}


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
