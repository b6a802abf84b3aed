"""Functions that another process runs and times: for settings that a process can make only once, through its environment."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection

import torch

from utils.memory import keep_freed_memory
from utils.timing import seconds_of

Functions = Mapping[str, Callable[[], object]]


@contextmanager
def timed_elsewhere(build: Callable[[], Functions], environment: Mapping[str, str]) -> Iterator[Callable[[str], float]]:
    """A process with `environment` that holds the functions of `build()`, which must be picklable.

    Gives what runs one of them there, by its name, and returns its seconds; that raises if the process has failed.
    """
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=_serve, args=(other, build, dict(environment)), daemon=True)
    process.start()
    other.close()  # or its end would never be noticed here

    def seconds(name: str) -> float:
        connection.send(name)
        return connection.recv()

    try:
        yield seconds
    finally:
        process.terminate()
        process.join()


def _serve(connection: Connection, build: Callable[[], Functions], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    keep_freed_memory()
    stopwatches = {name: partial(seconds_of, function, device=torch.device("cpu")) for name, function in build().items()}
    while True:
        connection.send(stopwatches[connection.recv()]())
