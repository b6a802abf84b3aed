"""Files that survive: written whole or not at all, checked when read, and never able to run code.

A file is written under a temporary name in its own folder, flushed to the disk, and renamed over the old one: a crash at
any moment leaves the old file or the new one. Checkpoints carry a SHA-256 over their content.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import sys
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError, printable, shown
from utils.untrusted import MAX_TEXT_BYTES, check_before_loading, check_loaded, open_regular, parse_json, read_whole

FORMAT = 1
DIGEST_KEY, FORMAT_KEY = "sha256", "format"
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


def digest(value: Any) -> str:
    """SHA-256 over names, types, shapes and bytes of a nest of mappings, sequences, tensors and plain values."""
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()


def _feed(state: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        state.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
        state.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    elif isinstance(value, Mapping):
        state.update(f"mapping {len(value)}\n".encode())
        for key in sorted(value, key=repr):
            state.update(f"key {key!r}\n".encode())
            _feed(state, value[key])
    elif isinstance(value, list | tuple):
        state.update(f"sequence {len(value)}\n".encode())
        if set(map(type, value)) == {int}:
            state.update("".join(map("{}\n".format, value)).encode())
            return
        for item in value:
            _feed(state, item)
    else:
        state.update(f"{value!r}\n".encode())


def save_checkpoint(path: str | os.PathLike, checkpoint: Mapping[str, Any]) -> None:
    """Writes a dict of tensors and plain values with its digest, atomically; `torch.load(weights_only=True)` reads it."""
    buffer = io.BytesIO()
    torch.save(_unshared({**checkpoint, DIGEST_KEY: digest(checkpoint)}), buffer)
    write_atomic(path, buffer.getbuffer())


def _unshared(value: Any) -> Any:
    """`value` with equal texts as one object and no container in two places; tensors stay what they are.

    Pickle writes an object that it meets again as a reference, so the size of a file would tell whether its texts were typed
    or read from another file, as those of a resumed run are.
    """
    if isinstance(value, str):
        return sys.intern(str(value))
    if isinstance(value, OrderedDict):  # a state dict has the versions of its modules as an attribute
        copied = OrderedDict((_unshared(key), _unshared(item)) for key, item in value.items())
        vars(copied).update(_unshared(vars(value)))
        return copied
    if isinstance(value, dict):
        return {_unshared(key): _unshared(item) for key, item in value.items()}
    return type(value)(map(_unshared, value)) if type(value) in (list, tuple) else value


def is_archive(path: str | os.PathLike) -> bool:
    """Whether a file begins like an archive and not like a checkpoint, which is a zip file or a pickle; False without a file."""
    try:
        with open_regular(path) as file:
            return file.read(9)[8:] == b"{"
    except (OSError, UserError):
        return False


def load_checkpoint(path: str | os.PathLike, *, flag: str = "") -> dict[str, Any]:
    """Reads a dict that torch wrote, onto the CPU, without ever running code from it, and checks its digest if it has one.

    `flag` is the command-line flag that named the file; it opens every message. Raises UserError for a file that is
    missing, truncated, damaged, no torch file, of a newer format, or that holds anything but tensors and plain values.
    """
    prefix = f"{flag} {path}" if flag else str(path)
    if is_archive(path):
        decode = f"python3 quantize_encode.py --decode {path} --output FILE.pt"
        raise UserError(f"{prefix}: an archive, expected a checkpoint; decode it first: {decode}")
    try:
        checkpoint = _read_tensors(path)
    except UserError as error:
        raise UserError(f"{prefix}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{prefix}: no such file") from error
    except OSError as error:
        raise UserError(f"{prefix}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        reason = "holds more than tensors and plain values" if zipfile.is_zipfile(path) else "not a checkpoint file"
        raise UserError(f"{prefix}: refused, {reason}; expected a file written by torch.save of a state_dict") from error
    except Exception as error:  # torch reports damage through many types
        raise UserError(f"{prefix}: damaged or truncated, not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{prefix}: holds a {type(checkpoint).__name__}, expected a checkpoint or a state_dict")
    version = checkpoint.get(FORMAT_KEY, FORMAT)
    if isinstance(version, int) and version > FORMAT:
        raise UserError(f"{prefix}: checkpoint format {shown(version)} is newer than what this version reads ({FORMAT})")
    if not _is_whole(checkpoint):
        raise UserError(f"{prefix}: damaged, its content does not match its SHA-256")
    return checkpoint


def _read_tensors(path: str | os.PathLike) -> Any:
    """What torch wrote, once it is known that reading and using it costs about as much as the file is large."""
    with open_regular(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other kinds of file torch warns before it raises: the error is what is shown
        check_before_loading(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        check_loaded(checkpoint, file_bytes=os.fstat(file.fileno()).st_size)
        return checkpoint


def _is_whole(checkpoint: dict[Any, Any]) -> bool:
    """Takes the digest out and checks it. Bare state_dicts of other people have none; a checkpoint of ours without is damaged."""
    expected = checkpoint.pop(DIGEST_KEY, None)
    if expected is None:
        return FORMAT_KEY not in checkpoint
    return expected == digest(checkpoint)
