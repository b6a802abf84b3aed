"""Entry scripts and other work in processes that are forked from this one, which has paid for the imports."""

import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from utils import profile

REPOSITORY = Path(__file__).resolve().parent.parent.parent


class Ended(NamedTuple):
    """How a script ended, minus the number of a signal that ended it, and what it printed."""

    status: int
    output: str
    errors: str


def run_forked(script: str, *words: str, folder: Path = REPOSITORY, streams: Mapping[int, int | None] | None = None) -> Ended:
    """Runs `script`, such as "pruning.py", in `folder`; the rest is as in `forked`."""

    def run() -> None:
        profile.MIN_RUN_SECONDS, profile.MIN_ROUNDS = 0.0, 2  # no test reads the latencies that a run ends with
        sys.argv = [script, *words]
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")

    return forked(run, folder=folder, streams=streams)


def forked(work: Callable[[], int | None], *, folder: Path, streams: Mapping[int, int | None] | None = None) -> Ended:
    """Does `work` in `folder` in a process of its own, whose status is what it returns.

    `streams` are descriptors in the place of 0, 1 or 2, None closes one; what it prints elsewhere is in the result.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        places = {1: output.fileno(), 2: errors.fileno(), **(streams or {})}
        child = os.fork()
        if child == 0:
            _do(work, folder=folder, places=places)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Ended(status, _content(output), _content(errors))


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _do(work: Callable[[], int | None], *, folder: Path, places: Mapping[int, int | None]) -> NoReturn:
    status: Any = 1
    try:
        os.chdir(folder)
        for place, descriptor in places.items():
            if descriptor is None:
                os.close(place)
            else:
                os.dup2(descriptor, place)
        sys.stdout = sys.__stdout__ = _stream(1)
        sys.stderr = sys.__stderr__ = _stream(2)
        status = work() or 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # this process ends below, and nobody else would hear of it
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)


def _stream(descriptor: int) -> IO[str] | None:
    """The stream that Python begins with: None on a descriptor that is closed."""
    try:
        return open(descriptor, "w", buffering=1, closefd=False)
    except OSError:
        return None
