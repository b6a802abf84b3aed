"""Checkpoints: dicts of tensors and plain values with a SHA-256 over their content, written whole, read without running code."""

import hashlib
import io
import os
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from utils.errors import UserError, shown
from utils.files import is_archive, write_atomic
from utils.untrusted import check_before_loading, check_loaded, inert_globals, open_regular, read_whole

FORMAT = 1
SAFETENSORS = ".safetensors"
DIGEST_KEY, FORMAT_KEY = "sha256", "format"


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


def load_checkpoint(path: str | os.PathLike, *, flag: str = "") -> dict[str, Any]:
    """Reads a dict that torch or safetensors wrote, onto the CPU, without ever running code from it, and checks its digest.

    `flag` is the command-line flag that named the file; it opens every message. Raises UserError for a file that is
    missing, truncated, damaged, no torch file, of a newer format, or that holds anything but tensors and plain values.
    """
    prefix = f"{flag} {path}" if flag else str(path)
    is_safetensors = str(path).lower().endswith(SAFETENSORS)
    if is_archive(path) and not is_safetensors:
        decode = f"python3 quantize_encode.py --decode {path} --output FILE.pt"
        raise UserError(f"{prefix}: an archive, expected a checkpoint; decode it first: {decode}")
    try:
        checkpoint = _read_safetensors(path) if is_safetensors else _read_tensors(path)
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
        with torch.serialization.safe_globals(inert_globals()):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        check_loaded(checkpoint, file_bytes=os.fstat(file.fileno()).st_size)
        return checkpoint


def _read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, which holds nothing else that counts; its reader takes no more than the file has."""
    data = read_whole(path)
    tensors = load_safetensors(data)
    check_loaded(tensors, file_bytes=len(data))
    return tensors


def _is_whole(checkpoint: dict[Any, Any]) -> bool:
    """Takes the digest out and checks it. Bare state_dicts of other people have none; a checkpoint of ours without is damaged."""
    expected = checkpoint.pop(DIGEST_KEY, None)
    if expected is None:
        return FORMAT_KEY not in checkpoint
    return expected == digest(checkpoint)
