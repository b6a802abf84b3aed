"""How an entry script ends: bad input in one line on stderr and status 2, never in a traceback."""

import argparse
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.cli.parser import Parser
from utils.cli.resumption import parse_flags
from utils.errors import Interrupted, NonFiniteLoss, UserError, printable
from utils.memory import keep_freed_memory
from utils.streams import NAMES, outlive_lost_streams, print_error, take_losses
from utils.version import REPOSITORY

SILENCE_SECONDS = 5.0
REQUIRED = frozenset(("torch", "torchvision", "numpy", "sklearn", "PIL", "matplotlib", "tqdm", "safetensors"))  # requirements.txt


def run_script(
    get_args_parser: Callable[[], Parser], main: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None
) -> NoReturn:
    """Runs an entry script on `argv`, or the command line, and exits; errors that name parameters name their flags."""

    def run() -> None:
        parser = get_args_parser()
        with parser.naming_flags():
            main(parse_flags(parser, argv))

    execute(run)


def execute(main: Callable[[], None]) -> NoReturn:
    """Runs an entry script's `main` and exits: 2 for bad input, 1 for a failed training, 128 + number for a signal.

    A package that everything needs and that is not installed is bad input as well.
    Output that got lost is a failure (1, or as if by SIGPIPE) where no run has it in its text log.
    """
    status: Any = 0
    outlive_lost_streams()
    keep_freed_memory()
    try:
        main()
        _leave_group()  # not after an error: a group that lost a member cannot be left in good order
    except UserError as error:
        status = _complain(error, status=2)
    except OSError as error:
        if error.filename is None:
            raise
        status = _complain(f"{printable(os.fsdecode(error.filename))}: {error.strerror}", status=2)
    except ModuleNotFoundError as error:
        if error.name not in REQUIRED:
            raise
        status = _complain(_how_to_install(error.name), status=2)
    except NonFiniteLoss as error:
        status = _complain(error, status=1)
    except Interrupted as error:
        status = _complain(error, status=128 + error.signal_number, what="")
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:  # of --help
        status = end.code
    except RuntimeError as error:
        if "utils.distributed" not in sys.modules or not sys.modules["utils.distributed"].is_lost_process(error):
            raise
        first_line = str(error).partition("\n")[0]
        status = _complain(f"another process has ended, its own message says why ({first_line})", status=1, is_echo=True)
    sys.exit(status or _output_status())


def _how_to_install(module: str) -> str:
    """What to type where a package that everything needs is not installed."""
    environment = REPOSITORY / ".venv"
    if (environment / "bin" / "activate").exists() and Path(sys.prefix).resolve() != environment.resolve():
        return f"{sys.executable} has no {module}, the environment in .venv may have: source {environment}/bin/activate"
    make = "python3 -m venv .venv && source .venv/bin/activate && pip install -r requirements.txt"
    return f"{sys.executable} has no {module}; make the environment in {REPOSITORY}: {make}"


def _leave_group() -> None:
    """Leaves the process group, which only who has imported what joins it can have joined."""
    if "utils.distributed" in sys.modules:
        sys.modules["utils.distributed"].leave()


def _output_status() -> int:
    """0, unless something that was printed is nowhere else. A reader that went away has read what it wanted: not a word then."""
    loss = take_losses().get(NAMES["stdout"])
    if loss is None:
        return 0
    if loss.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE
    return _complain(f"{NAMES['stdout']} cannot be written: {loss.strerror}", status=1)


def _complain(error: Exception | str, *, status: int, is_echo: bool = False, what: str = "error") -> int:
    """Prints one line. Of many processes the one whose error it is speaks, and the main one where all have the same.

    So the main process speaks at once, unless its error is the echo of another's. Any other waits meanwhile, and only
    speaks if torchrun has not ended it by then, as it does when the first process ends.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, Interrupted):
        return status  # the processes agreed to stop
    if rank != "0" or is_echo:
        time.sleep(SILENCE_SECONDS)
    place = f" (process {rank})" if rank != "0" else ""
    head = f"{Path(sys.argv[0]).name}: {what}{place}".removesuffix(": ")
    print_error(f"{head}: {' '.join(str(error).split())}")
    return status
