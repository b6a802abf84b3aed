"""Reads the commands of a script from standard input, one a line, and checks the flags of each before the first of them runs.

DRY=1 scripts/run_pruning.sh | python3 -m scripts.check_commands
"""

import importlib
import shlex
import sys
from collections.abc import Callable, Iterable

from utils import cli
from utils.errors import UserError

ENTRY_SCRIPTS = ("initial_train", "pruning", "quantize_encode")


def check_commands(lines: Iterable[str]) -> None:
    """Raises UserError, naming the entry script, for the first command with flags that it does not take."""
    parsers: dict[str, Callable[[], cli.Parser]] = {}
    for line in lines:
        words = shlex.split(line)
        entry_script = words[1].removesuffix(".py") if len(words) > 1 else ""
        if entry_script not in ENTRY_SCRIPTS:
            continue
        if entry_script not in parsers:
            parsers[entry_script] = importlib.import_module(entry_script).get_args_parser
        try:
            cli.parse_flags(parsers[entry_script](), [word for word in words[2:] if word != "--auto-resume"])
        except UserError as error:
            raise UserError(f"{entry_script}.py: {error}") from error


if __name__ == "__main__":
    try:
        check_commands(sys.stdin.read().splitlines())
    except UserError as error:
        sys.exit(str(error))
