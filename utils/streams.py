"""Standard output and standard error that a training outlives: closed from the start, a reader that went away, a full disk.

What cannot be written is dropped, and kept in mind until somebody asks: a run notes it in its text log, a command that
leaves nothing but what it prints fails.
"""

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

NAMES = {"stdout": "standard output", "stderr": "standard error"}


def outlive_lost_streams() -> None:
    """Puts streams whose writes never fail in the place of this process's own ones, and something harmless on closed descriptors.

    A file that is opened later must not become descriptor 1 or 2, where any library may print into it. Streams that were put
    in the place of the process's own ones stay.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free, so this one
    for name in NAMES:
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _outlived(name, stream))


def _outlived(name: str, stream: TextIO | None) -> TextIO:
    if stream is None:  # closed when Python began; by now its descriptor may be that of another file
        raw, encoding, direct, by_line = _Outlived(os.devnull, name, is_closed=True), "utf-8", False, False
    else:
        with contextlib.suppress(OSError):
            stream.flush()
        raw, encoding = _Outlived(stream.fileno(), name), stream.encoding
        direct, by_line = stream.write_through, stream.line_buffering
    return io.TextIOWrapper(
        raw if direct else io.BufferedWriter(raw),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=by_line,
        write_through=direct,
    )


class _Outlived(io.FileIO):
    """A file or descriptor; it takes everything, and `loss` is why it could not write."""

    def __init__(self, file: str | int, name: str, *, is_closed: bool = False):
        super().__init__(file, "w", closefd=isinstance(file, str))
        self.name = f"<{name}>"
        self.is_closed = is_closed
        self.loss: OSError | None = None
        self.is_told = False

    def write(self, data: Any) -> int:
        """Writes all of `data` that can be written; waits where the descriptor would not."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            if self.is_closed:
                raise OSError(errno.EBADF, "it is closed")
            while left:
                written = super().write(left)
                if written is None:
                    select.select((), (self,), ())
                else:
                    left = left[written:]
        except OSError as error:  # a full disk may have room later, so the next write is tried as well
            self.loss = self.loss or error
        return size


def take_losses() -> dict[str, OSError]:
    """What could not be written, by the name of the stream; each loss is given once."""
    losses = {}
    for name, shown in NAMES.items():
        raw = _raw(getattr(sys, name))
        if isinstance(raw, _Outlived):
            getattr(sys, name).flush()
            if raw.loss is not None and not raw.is_told:
                raw.is_told, losses[shown] = True, raw.loss
    return losses


def print_error(line: str) -> None:
    """Prints a line on standard error, or where that is lost on standard output."""
    print(line, file=sys.stderr, flush=True)
    if getattr(_raw(sys.stderr), "loss", None) is not None:
        print(line, flush=True)


def _raw(stream: Any) -> Any:
    buffer = getattr(stream, "buffer", None)  # streams in memory have none
    return getattr(buffer, "raw", buffer)
