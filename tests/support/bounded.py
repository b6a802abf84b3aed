"""Runs a function in a process of its own that may take no more than so much memory above what this one has."""

import multiprocessing
import resource
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY_BYTES = 500 << 20
PAGE_BYTES = resource.getpagesize()


def run_bounded(function: Callable[..., Any], *arguments: Any, memory_bytes: int = MEMORY_BYTES) -> Any:
    """What `function` returns, from a forked process whose address space is limited. Its failure is this one's."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_limited, args=(sender, memory_bytes, function, arguments))
    process.start()
    sender.close()
    try:
        failure, result = receiver.recv()
    except EOFError:
        failure, result = "it ended without a word", None
    process.join()
    assert failure is None, failure
    return result


def _limited(sender: Any, memory_bytes: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, resource.RLIM_INFINITY))
    try:
        sender.send((None, function(*arguments)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
