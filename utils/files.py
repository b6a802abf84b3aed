"""Files that survive: written whole or not at all, and bounded before they are read.

A file is written under a temporary name in its own folder, flushed to the disk, and renamed over the old one: a crash at
any moment leaves the old file or the new one.
"""

import contextlib
import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from utils.errors import UserError, printable
from utils.untrusted import MAX_TEXT_BYTES, open_regular, parse_json, read_whole

TEMPORARY_PREFIX = ".partial-"


def check_output(output: Path, *, force: bool) -> None:
    """Raises UserError, naming --output, for a file that exists, unless `force`, and where none can be written."""
    if output.exists() and not force:
        raise UserError(f"--output {output}: exists, choose another name or give --force")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: cannot be written, there is no folder {output.parent}")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: cannot be written, name a file in a folder that you may write to")


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Replaces `path` by a file that holds `data`, on the disk when this returns. Raises UserError if that fails."""
    path = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY_PREFIX}{path.name}-")
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~current_umask())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def current_umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial_files(folder: Path) -> None:
    """Clears what a process that was killed while writing left behind."""
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        leftover.unlink(missing_ok=True)


def append_line(path: str | os.PathLike, line: str, *, durable: bool = False) -> None:
    """Adds one whole line by a single write, so that several processes can share the file; `durable`: to the disk at once.

    Raises UserError if that fails.
    """
    data = (line + "\n").encode()
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # what lies there is a file of ours
        handle = os.open(path, flags, 0o666)
        try:
            if os.write(handle, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: str | os.PathLike, *, flag: str | None = None) -> Any:
    """Reads a JSON file. Raises UserError, naming it and its `flag`, if it is missing, no ordinary file, or no JSON."""
    name = f"{flag} {path}" if flag else path
    try:
        return parse_json(read_whole(path, limit=MAX_TEXT_BYTES))
    except UserError as error:
        raise UserError(f"{name} {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{name} is damaged: not valid JSON ({printable(str(error))})") from error


def is_archive(path: str | os.PathLike) -> bool:
    """Whether a file begins like an archive and not like a checkpoint, which is a zip file or a pickle; False without a file."""
    try:
        with open_regular(path) as file:
            return file.read(9)[8:] == b"{"
    except (OSError, UserError):
        return False
