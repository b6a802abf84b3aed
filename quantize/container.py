"""Named byte sections and one JSON description in a safetensors file, with a SHA-256 over every byte of it.

Any safetensors reader opens such a file: each section is a one-dimensional U8 tensor, and the metadata has one key. The
digest is computed with its own 64 digits replaced by zeros, so that the header is covered like everything else.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from utils.errors import UserError, printable, shown

METADATA_KEY = "archive"
MAX_HEADER_BYTES = 1 << 22  # parsed JSON takes many times its text
_NO_DIGEST = "0" * 64


def pack_sections(sections: Mapping[str, bytes], description: Mapping[str, Any]) -> bytes:
    """The whole file: `sections` by name, and `description`, a JSON object of plain values without a `sha256`.

    Raises UserError for a description that is too long to be read back.
    """
    tensors = {name: np.frombuffer(data, np.uint8) for name, data in sections.items()}
    # the digest comes first: what is described may hold as many zeros
    text = json.dumps({"sha256": _NO_DIGEST, **description}, separators=(",", ":"), ensure_ascii=False)
    data = safetensors.numpy.save(tensors, {METADATA_KEY: text})
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise UserError(f"an archive's description takes at most {MAX_HEADER_BYTES:,} bytes: shorten the names of the classes")
    return data.replace(_NO_DIGEST.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def read_description(data: bytes) -> dict[str, Any]:
    """The description of a file, before anything of it is checked but its form. Raises UserError."""
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise UserError("not an archive of this program, or damaged: its header cannot be read")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_without_duplicates)
        description = json.loads(header["__metadata__"][METADATA_KEY], object_pairs_hook=_without_duplicates)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError("not an archive of this program, or damaged: its header cannot be read") from error
    if not isinstance(description, dict):
        raise UserError("damaged, its description is no JSON object")
    return description


def unpack_sections(data: bytes, description: Mapping[str, Any]) -> dict[str, bytearray]:
    """The sections of a file whose digest agrees. Raises UserError, for anything else."""
    digest = description.get("sha256")
    if not isinstance(digest, str) or len(digest) != 64 or not digest.isascii():
        raise UserError("damaged, it holds no SHA-256")
    if hashlib.sha256(data.replace(digest.encode(), _NO_DIGEST.encode(), 1)).hexdigest() != digest:
        raise UserError("damaged, its content does not match its SHA-256")
    try:
        tensors = safetensors.deserialize(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"damaged, not a safetensors file ({printable(str(error))})") from error
    for name, tensor in tensors:
        if tensor["dtype"] != "U8" or len(tensor["shape"]) != 1:
            raise UserError(
                f"damaged, section {shown(name, 80)} is {tensor['dtype']} {shown(tensor['shape'], 80)}, expected bytes"
            )
    return {name: tensor["data"] for name, tensor in tensors}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name occurs twice")
    return members
