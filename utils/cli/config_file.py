"""Flags in a TOML file: `--config FILE.toml` stands for them, any flag of the command line wins.

A key is a flag without its dashes at the front, `prune-rates = [0.6]` or `prune_rates = [0.6]`. Each run leaves such a file with
the flags that it was given. Whoever wrote it, nothing runs because it says so: a `FILE.py:FUNCTION` counts on the command line
only.
"""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.cli.effects import check_effects, flag_of, given_flags
from utils.cli.parser import Parser
from utils.errors import UserError, naming, printable, shown
from utils.python_file import code_in
from utils.untrusted import MAX_TEXT_BYTES, read_whole

TYPED_ONLY = frozenset(("help", "config", "resume", "force", "accept_data"))  # decide what is replaced or accepted
NOT_WRITTEN = frozenset(("run_name", "save_dir", "resume", "auto_resume", "config", "dry_run", "evaluate"))  # of one run alone
_KEY = re.compile(r"""^\s*["']?(?P<key>[\w-]+)["']?\s*=""")


@dataclass(frozen=True)
class ConfigFile:
    """`words` are the flags of the file at `path` as they would be typed, `lines` where each stands, by name in the namespace."""

    path: str
    words: Mapping[str, list[str]]
    lines: Mapping[str, int]

    def place(self, name: str) -> str:
        """`run.toml line 3, prune-mode`."""
        return f"--config {self.path} line {self.lines[name]}, {_key_of(name)}"

    def command(self, *, without: Mapping[str, Any]) -> list[str]:
        """All words, but those of the flags `without`."""
        return [word for name, words in self.words.items() if name not in without for word in words]


def read_config_file(parser: Parser, path: str, *, given: Mapping[str, Any]) -> ConfigFile:
    """The flags of a file, each checked by itself; those that are `given` on the command line need not be right.

    Raises UserError, with file, line and key, for a key that is no flag of `parser` or that stands there twice, and for a value
    that its flag does not take.
    """
    text = _text(path)
    lines = _lines(path, text)
    words = {}
    for key, value in _parsed(path, text).items():
        name = key.replace("-", "_")
        place = f"--config {path} line {lines.get(name, 1)}, {printable(key)}"
        if name not in parser.names() - TYPED_ONLY:
            raise UserError(f"{place}: {_unknown(parser, name)}")
        if name in given:
            continue
        if code_in(value):
            raise UserError(f"{place}: {shown(value)} is code, which never runs because a file names it; type {flag_of(name)}")
        with naming(place):
            words[name] = _words(name, value)
            parser.parse_args(words[name])
    return ConfigFile(path, words, lines)


def _text(path: str) -> str:
    try:
        return read_whole(path, limit=MAX_TEXT_BYTES).decode()
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"--config {path} {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: is no text in UTF-8") from error


def _lines(path: str, text: str) -> dict[str, int]:
    """The line of each key, counted from 1. Raises UserError for a key that stands there twice, however it is spelt."""
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        found = _KEY.match(line)
        name = found["key"].replace("-", "_") if found else None
        if name in lines:
            raise UserError(f"--config {path} line {number}, {printable(found['key'])}: stands in line {lines[name]} already")
        if name is not None:
            lines[name] = number
    return lines


def _parsed(path: str, text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # before Python 3.11
        try:
            import tomli as tomllib
        except ImportError as error:
            raise UserError(f"--config {path}: needs Python 3.11 or newer, or the package tomli: pip install tomli") from error
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"--config {path}: is no TOML: {printable(str(error))}") from error


def _unknown(parser: Parser, name: str) -> str:
    if name in TYPED_ONLY:
        return f"{flag_of(name)} counts on the command line only"
    return f"is no flag of {parser.prog}{parser.nearest_flags([flag_of(name)])}"


def _words(name: str, value: Any) -> list[str]:
    """A flag as it is typed. Raises UserError for what no flag takes."""
    if isinstance(value, bool):
        return [flag_of(name)] if value else []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float) and not isinstance(each, bool) for each in values):
        raise UserError(f"{shown(value)} is no value of a flag")
    if isinstance(value, list):
        if any(str(each).startswith("-") for each in values):
            raise UserError(f"{shown(value)} is no value of a flag")
        return [flag_of(name), *map(str, values)]
    return [f"{flag_of(name)}={value}"]


def config_text(script: str, given: Mapping[str, Any]) -> str:
    """The flags that a run was `given`, as a file for `--config`; its name and folder are left out, which are its own."""
    lines = [f"# python3 {script} --config THIS_FILE; any flag beside it wins"]
    for name, value in given.items():
        if name in NOT_WRITTEN or value is None or value is False:
            continue
        line = f"{_key_of(name)} = {_toml(value)}"
        is_code = code_in(value)
        lines.append(f"# code, to be typed: {line}" if is_code else line)
    return "\n".join(lines) + "\n"


def _key_of(name: str) -> str:
    return name.replace("_", "-")


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


def take_config(parser: Parser, words: list[str]) -> tuple[list[str], ConfigFile | None]:
    """The command line with the flags of its --config in front, and that file if there is one."""
    given = given_flags(parser, words)
    path = given.get("config")
    if path is None:
        return words, None
    if "resume" in given:
        raise UserError(f"--config {path}: not with --resume, a resumed run keeps its flags")
    file = read_config_file(parser, path, given=given)
    return [*file.command(without=given), *words], file


def check_together(parser: Parser, file: ConfigFile, args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Raises UserError, naming file, line and key, for a flag of the file that has no effect beside the others."""
    for name in file.words.keys() & given.keys():
        with naming(file.place(name)):
            check_effects(parser.rules, args, {name: given[name]})
