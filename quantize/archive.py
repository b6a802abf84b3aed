"""One network in one small file, `model.huff`, and back, bit for bit.

Every weight tensor whose values repeat enough for it to pay is stored as a codebook and one canonical Huffman code; all
other tensors are stored as they are. Names and shapes are not stored: they follow from the architecture's name and the
channels that are kept. The byte layout is described in docs/formats.md.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models import MODELS, build_model, build_on_meta, trusted_model
from models.network_file import with_versions
from quantize import huffman, level_body
from quantize.compression import CodedWeight
from quantize.container import pack_sections, read_description, unpack_sections
from quantize.layout import (
    SHOWN_VALUE,
    Cursor,
    bit_patterns,
    check_fits,
    cut_network,
    element_types,
    pack_kept,
    packed_bytes,
    unpack_bits,
    unpack_kept,
    unusual_dtypes,
)
from quantize.level_coder import SYMBOLS_PER_BYTE
from quantize.table import ArchiveReport, LayerSize, plain_size
from utils.errors import UserError, printable, shown
from utils.files import write_atomic
from utils.images.spec import FIELDS, GREY_BITS_FIELD, ImageSpec, read_image_spec
from utils.seed import preserved_random_state
from utils.untrusted import read_whole

PLAIN_FORMAT, FORMAT = 1, 2  # without and with what a user of the network must know of its images
LEVEL_FORMAT = 3  # as 2, with weights as levels of steps
SECTIONS = ("payload", "codebooks", "code_lengths", "layers", "kept", "uncoded")
MAX_CLASSES = 1 << 20  # a network that is put together channel by channel costs time and memory for each of them
LENGTH_BITS = 5  # of a code length in the file
LAYER_ROW = np.dtype([("entries", "<u4"), ("payload_bytes", "<u4")])


class CodedTensor(NamedTuple):
    """A tensor as the file holds it; its values are `codebook[symbols]`, as unsigned words of the element's size."""

    codebook: np.ndarray  # (K,) ascending words, each of them used
    code_lengths: np.ndarray  # (K,) bits
    payload: bytes
    frequencies: np.ndarray  # (K,)

    @property
    def coded_bytes(self) -> int:
        """Payload, codebook and code lengths together."""
        return len(self.payload) + self.codebook.nbytes + packed_bytes(LENGTH_BITS * self.codebook.size)


def save_archive(
    path: str | os.PathLike,
    network: nn.Module,
    *,
    model: str,
    num_classes: int,
    images: ImageSpec | None = None,
    weights: Mapping[str, CodedWeight] | None = None,
) -> ArchiveReport:
    """Writes `network`, dense or narrow, to `path`, atomically, and says where the bytes went.

    `model` is its name, as `models.build_model` takes it; `images` goes into the archive where it is known. With `weights`, the
    levels of a compressed network's tensors, it is the second codec's (format 3). Raises UserError if the network is not that
    model with so many classes (shared weights have to be baked first) or if the file cannot be written.
    """
    data, report = pack_archive(network, model=model, num_classes=num_classes, images=images, weights=weights)
    write_atomic(path, data)
    return report


def pack_archive(
    network: nn.Module,
    *,
    model: str,
    num_classes: int,
    images: ImageSpec | None = None,
    weights: Mapping[str, CodedWeight] | None = None,
) -> tuple[bytes, ArchiveReport]:
    """The bytes that `save_archive` writes."""
    if num_classes > MAX_CLASSES:
        raise UserError(f"cannot archive a network with {num_classes} classes, at most {MAX_CLASSES:,} are read back")
    dense = build_on_meta(model, num_classes=num_classes)
    kept = dict(getattr(network, "kept", {}))
    expected = cut_network(dense, kept, images).state_dict()
    state = network.state_dict()
    check_fits(state, expected, f"{model} with {num_classes} classes")
    described = {"model": model, "num_classes": num_classes, "dtypes": unusual_dtypes(state, expected)}
    if images is not None:
        described |= images.as_fields()
    if weights is None:
        description = {"format": PLAIN_FORMAT if images is None else FORMAT, **described}
        sections, stored = _pack_huffman({name: state[name] for name in expected})
    else:
        fills, sections, stored = level_body.pack({name: state[name] for name in expected}, weights)
        description = {"format": LEVEL_FORMAT, **described, "fills": fills}
    sections["kept"] = pack_kept(dense, kept)
    data = pack_sections(sections, description)
    return data, _report(description, dense, stored, file_bytes=len(data), images=images)


def load_archive(path: str | os.PathLike, *, model: str | None = None) -> nn.Module:
    """The network of an archive, on the CPU, in eval mode, each tensor bit for bit what was saved.

    `model` says which network it must hold. An archive of a network from a Python file needs it, for no code runs because a
    file names it. Raises UserError, in one line, for a file that is missing, damaged in any way, of a newer format, or that
    describes what no network of this program is; memory stays in proportion to the file and its network.
    """
    return read_archive(path, model=model)[0]


def read_archive(path: str | os.PathLike, *, model: str | None = None) -> tuple[nn.Module, ArchiveReport]:
    """`load_archive`, and where the bytes of the file go; the report names the model and its classes."""
    try:
        return _read(read_whole(path), model)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_flagged(path: str, *, flag: str, model: str | None) -> tuple[nn.Module, ArchiveReport]:
    """`read_archive` of the file that `flag` names, which holds the `model` of --model where that is given."""
    try:
        return read_archive(path, model=model)
    except UserError as error:
        raise UserError(f"{flag} {error}") from error


def differing_tensors(first: nn.Module, second: nn.Module) -> list[str]:
    """Names of the tensors in the two networks' state dicts that are not the same in type, shape and every bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    return [name for name in {**ours, **theirs} if name not in ours or name not in theirs or not _same(ours[name], theirs[name])]


# ---- writing -----------------------------------------------------------------------------------------------------------


def _pack_huffman(state: Mapping[str, Tensor]) -> tuple[dict[str, bytes], dict[str, LayerSize]]:
    """The sections of formats 1 and 2 but for `kept`, and the sizes of the weights."""
    sections = {name: bytearray() for name in SECTIONS if name != "kept"}
    return sections, {name: _size(name, tensor, _add_tensor(sections, tensor)) for name, tensor in state.items()}


def _add_tensor(sections: dict[str, bytearray], tensor: Tensor) -> CodedTensor | None:
    """Appends a tensor to the sections of the file; a weight (two dimensions or more) also gets a row in the layer table."""
    words = bit_patterns(tensor)
    coded = _code(words) if tensor.dim() > 1 else None
    if coded is None:
        sections["uncoded"] += words.tobytes()
    else:
        sections["payload"] += coded.payload
        sections["codebooks"] += coded.codebook.tobytes()
        sections["code_lengths"] += _pack_lengths(coded.code_lengths)
    if tensor.dim() > 1:
        row = (0, 0) if coded is None else (coded.codebook.size, len(coded.payload))
        sections["layers"] += np.array(row, "<u4").tobytes()
    return coded


def _code(words: np.ndarray) -> CodedTensor | None:
    """The words (N,) coded, or None where storing them as they are takes no more."""
    codebook, frequencies = np.unique(words, return_counts=True)
    if codebook.nbytes >= words.nbytes or codebook.size > huffman.MAX_ALPHABET:
        return None
    payload, code_lengths = huffman.encode(np.searchsorted(codebook, words))
    coded = CodedTensor(codebook, code_lengths, payload, frequencies)
    return coded if coded.coded_bytes < words.nbytes else None


# ---- reading -----------------------------------------------------------------------------------------------------------


def _read(data: bytes, model: str | None) -> tuple[nn.Module, ArchiveReport]:
    description = read_description(data)
    _check_format(description)
    sections = unpack_sections(data, description)
    _check_description(description, sections)
    images = read_image_spec(description, num_classes=description["num_classes"])
    description = {**description, "model": trusted_model(description["model"], model)}
    identity = {"name": description["model"], "num_classes": description["num_classes"]}
    dense = build_on_meta(**identity)
    kept = unpack_kept(dense, sections["kept"])
    network = cut_network(dense, kept, images)
    expected = network.state_dict()
    types = dict(zip(expected, element_types(expected, description["dtypes"]), strict=True))
    if description["format"] == LEVEL_FORMAT:
        state, stored = level_body.unpack(sections, expected, types, fills=description["fills"])
    else:
        state, stored = _unpack_huffman(sections, expected, types)
    report = _report(description, dense, stored, file_bytes=len(data), images=images)
    if description["model"] not in MODELS:  # it may hold tensors beside its state, which now cost no more than the file
        with preserved_random_state():
            dense = build_model(**identity)
        network = cut_network(dense, kept, images)
    network.load_state_dict(with_versions(state, like=expected), assign=True)
    return network.eval(), report


def _unpack_huffman(
    sections: Mapping[str, bytes], expected: Mapping[str, Tensor], types: Mapping[str, torch.dtype]
) -> tuple[dict[str, Tensor], dict[str, LayerSize]]:
    cursors = {name: Cursor(sections[name], name) for name in SECTIONS if name != "kept"}
    state, stored = {}, {}
    for name, tensor in expected.items():
        state[name], coded = _take_tensor(cursors, tensor, types[name])
        stored[name] = _size(name, state[name], coded)
    for cursor in cursors.values():
        cursor.finish()
    return state, stored


def _check_format(description: Mapping[str, Any]) -> None:
    version = description.get("format")
    if type(version) is not int or version < 1:
        raise UserError(f"damaged, its format is {shown(version, SHOWN_VALUE)}, expected a number")
    if version > LEVEL_FORMAT:
        raise UserError(f"has format {shown(version, SHOWN_VALUE)}, newer than format {LEVEL_FORMAT} that this program reads")


def _check_description(description: Mapping[str, Any], sections: Mapping[str, bytes]) -> None:
    has_levels = description["format"] == LEVEL_FORMAT
    wanted = (*level_body.SECTIONS, "kept") if has_levels else SECTIONS
    if set(sections) != set(wanted):
        raise UserError(f"damaged, it holds the sections {printable(', '.join(sorted(sections)))}, expected {', '.join(wanted)}")
    fields = [{"format", "model", "num_classes", "dtypes", "sha256"}, {"fills"} if has_levels else set()]
    plain, images = set.union(*fields), {*FIELDS}
    possible = {PLAIN_FORMAT: [plain], FORMAT: [plain | images], LEVEL_FORMAT: [plain, plain | images]}
    if set(description) - {GREY_BITS_FIELD} not in possible[description["format"]]:
        raise UserError(f"damaged, its description names {printable(', '.join(description))}")
    if not isinstance(description["model"], str):
        raise UserError(f"damaged, its network is {shown(description['model'], SHOWN_VALUE)}, expected a name")
    classes = description["num_classes"]
    if type(classes) is int and classes > MAX_CLASSES:
        raise UserError(f"has {shown(classes, SHOWN_VALUE)} classes, at most {MAX_CLASSES:,} are read")
    room = len(sections["uncoded"]) + SYMBOLS_PER_BYTE * len(sections.get("words", b""))
    if type(classes) is not int or not 1 <= classes <= room:  # each class has a bias or weights
        raise UserError(f"damaged, {shown(classes, SHOWN_VALUE)} classes do not fit into its {room} bytes of biases")


def _take_tensor(cursors: Mapping[str, Cursor], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, CodedTensor | None]:
    """The next tensor of the file, with the shape of `like`."""
    words = f"<u{dtype.itemsize}"
    coded = None
    entries, payload_bytes = 0, 0
    if like.dim() > 1:
        entries, payload_bytes = np.frombuffer(cursors["layers"].take(LAYER_ROW.itemsize), LAYER_ROW)[0].tolist()
    if entries:
        codebook = np.frombuffer(cursors["codebooks"].take(entries * dtype.itemsize), words)
        code_lengths = _unpack_lengths(cursors["code_lengths"].take(packed_bytes(LENGTH_BITS * entries)), entries)
        payload = cursors["payload"].take(payload_bytes)
        symbols = huffman.decode(payload, code_lengths, like.numel())
        coded = CodedTensor(codebook, code_lengths, payload, np.bincount(symbols, minlength=entries))
        values = codebook[symbols]
    elif payload_bytes:
        raise UserError(f"damaged, a layer without codebook has {payload_bytes} bytes of payload")
    else:
        values = np.frombuffer(bytearray(cursors["uncoded"].take(like.numel() * dtype.itemsize)), words)
    return torch.from_numpy(values.view(np.uint8)).view(dtype).view(like.shape), coded


# ---- both ways ---------------------------------------------------------------------------------------------------------


def _pack_lengths(lengths: np.ndarray) -> bytes:
    return np.packbits(np.unpackbits(lengths[:, None], axis=1)[:, 8 - LENGTH_BITS :]).tobytes()


def _unpack_lengths(data: bytes, count: int) -> np.ndarray:
    bits = unpack_bits(data, LENGTH_BITS * count, "code_lengths").reshape(count, LENGTH_BITS)
    return np.packbits(bits, axis=1)[:, 0] >> (8 - LENGTH_BITS)


def _same(first: Tensor, second: Tensor) -> bool:
    return (first.dtype, first.shape) == (second.dtype, second.shape) and np.array_equal(
        bit_patterns(first), bit_patterns(second)
    )


def _report(
    description: Mapping[str, Any],
    dense: nn.Module,
    stored: Mapping[str, LayerSize],
    *,
    file_bytes: int,
    images: ImageSpec | None,
) -> ArchiveReport:
    """`stored` are the sizes of what is left of the weights; their `original_bytes` become those of the dense ones."""
    weights = {name: tensor for name, tensor in dense.state_dict().items() if tensor.dim() > 1}
    nothing = LayerSize("", 0, 0, 0, 0, 0.0, 0, 0)
    layers = tuple(
        replace(stored.get(name, nothing), name=name, original_bytes=tensor.nbytes) for name, tensor in weights.items()
    )
    others = sum(size.coded_bytes for name, size in stored.items() if name not in weights)
    return ArchiveReport(description["model"], description["num_classes"], layers, others, file_bytes, images)


def _size(name: str, tensor: Tensor, coded: CodedTensor | None) -> LayerSize:
    """What a tensor takes in formats 1 and 2."""
    if coded is None:
        return plain_size(name, tensor)
    weights, nonzero = tensor.numel(), int(torch.count_nonzero(tensor))
    shannon_bits = huffman.entropy_bits(coded.frequencies)
    return LayerSize(
        name, tensor.nbytes, weights, nonzero, coded.codebook.size, shannon_bits, len(coded.payload), coded.coded_bytes
    )
