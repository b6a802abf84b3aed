"""Functions that another process runs and times: for settings that a process can make only once, through its environment."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType

import torch

from benchmarks.common import seconds_of
from utils.memory import keep_freed_memory

Functions = Mapping[str, Callable[[], object]]
PAUSE_SECONDS = 0.05  # until the threads of one process no longer wait for work in a loop, which would slow the other one


class Worker:
    """A process with `environment` that holds the functions of `build()`, which must be picklable. Ends with its `with`."""

    def __init__(self, build: Callable[[], Functions], environment: Mapping[str, str]):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, build, dict(environment)), daemon=True)

    def __enter__(self) -> "Worker":
        self._process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.join()

    def seconds(self, name: str) -> float:
        """Runs the function of this name there."""
        self._connection.send(name)
        return self._connection.recv()


def _serve(connection: Connection, build: Callable[[], Functions], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    keep_freed_memory()
    stopwatches = {name: partial(seconds_of, function, device=torch.device("cpu")) for name, function in build().items()}
    while True:
        connection.send(stopwatches[connection.recv()]())
