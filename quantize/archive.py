"""One network in one small file, `model.huff`, and back, bit for bit.

Every weight tensor whose values repeat enough for it to pay is stored as a codebook and one canonical Huffman code; all
other tensors are stored as they are. Names and shapes are not stored: they follow from the architecture's name and the
channels that are kept. The byte layout is described in docs/archive_format.md.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models import MODELS, build_model, build_on_meta, trusted_model
from models.graph import ChannelGraph, output_channels
from models.narrow import Selection
from models.network_file import example_images, with_versions
from quantize import huffman
from quantize.container import pack_sections, read_description, unpack_sections
from quantize.table import ArchiveReport, LayerSize
from utils.errors import UserError, printable, shown
from utils.files import write_atomic
from utils.images.spec import FIELDS, GREY_BITS_FIELD, ImageSpec, read_image_spec
from utils.seed import preserved_random_state
from utils.untrusted import read_whole

PLAIN_FORMAT, FORMAT = 1, 2  # without and with what a user of the network must know of its images
SHOWN_VALUE = 80
SECTIONS = ("payload", "codebooks", "code_lengths", "layers", "kept", "uncoded")
MAX_CLASSES = 1 << 20  # a network that is put together channel by channel costs time and memory for each of them
LENGTH_BITS = 5  # of a code length in the file
LAYER_ROW = np.dtype([("entries", "<u4"), ("payload_bytes", "<u4")])
FLOAT_TYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


class CodedTensor(NamedTuple):
    """A tensor as the file holds it; its values are `codebook[symbols]`, as unsigned words of the element's size."""

    codebook: np.ndarray  # (K,) ascending words, each of them used
    code_lengths: np.ndarray  # (K,) bits
    payload: bytes
    frequencies: np.ndarray  # (K,)

    @property
    def coded_bytes(self) -> int:
        """Payload, codebook and code lengths together."""
        return len(self.payload) + self.codebook.nbytes + _packed_bytes(LENGTH_BITS * self.codebook.size)


def save_archive(
    path: str | os.PathLike, network: nn.Module, *, model: str, num_classes: int, images: ImageSpec | None = None
) -> ArchiveReport:
    """Writes `network`, dense or narrow, to `path`, atomically, and says where the bytes went.

    `model` is its name, as `models.build_model` takes it; `images` goes into the archive where it is known. Raises UserError
    if the network is not that model with so many classes (shared weights have to be baked first) or if the file cannot be
    written.
    """
    if num_classes > MAX_CLASSES:
        raise UserError(f"cannot archive a network with {num_classes} classes, at most {MAX_CLASSES:,} are read back")
    dense = build_on_meta(model, num_classes=num_classes)
    kept = dict(getattr(network, "kept", {}))
    expected = _cut(dense, kept, images).state_dict()
    state = network.state_dict()
    _check_fits(state, expected, f"{model} with {num_classes} classes")
    sections = {name: bytearray() for name in SECTIONS}
    sections["kept"] += _pack_kept(dense, kept)
    coded = {name: _add_tensor(sections, state[name]) for name in expected}
    description = {
        "format": PLAIN_FORMAT if images is None else FORMAT,
        "model": model,
        "num_classes": num_classes,
        "dtypes": _unusual_dtypes(state, expected),
        **(images.as_fields() if images is not None else {}),
    }
    data = pack_sections(sections, description)
    write_atomic(path, data)
    return _report(description, dense, state, coded, file_bytes=len(data), images=images)


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


def _add_tensor(sections: dict[str, bytearray], tensor: Tensor) -> CodedTensor | None:
    """Appends a tensor to the sections of the file; a weight (two dimensions or more) also gets a row in the layer table."""
    words = _words(tensor)
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


def _words(tensor: Tensor) -> np.ndarray:
    """The elements' bit patterns as little-endian unsigned integers, (N,)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")


def _unusual_dtypes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Positions, in the order of `expected`, of tensors with another floating-point type than the architecture gives them."""
    unusual: dict[str, list[int]] = {}
    for position, (name, tensor) in enumerate(expected.items()):
        dtype = state[name].dtype
        if dtype != tensor.dtype:
            dtype_name = str(dtype).removeprefix("torch.")
            if not tensor.is_floating_point() or dtype_name not in FLOAT_TYPES:
                raise UserError(f"cannot archive {name} as {dtype}: expected {tensor.dtype} or a type of its kind")
            unusual.setdefault(dtype_name, []).append(position)
    return unusual


def _check_fits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], wanted: str) -> None:
    for name in {**expected, **state}:
        ours, theirs = (str(tuple(tensors[name].shape)) if name in tensors else "absent" for tensors in (state, expected))
        if ours != theirs:
            raise UserError(f"cannot archive the network as {wanted}: {name} is {ours}, expected {theirs}")


# ---- reading -----------------------------------------------------------------------------------------------------------


class _Cursor:
    """Takes a section apart from front to back and refuses what does not come out even."""

    def __init__(self, data: bytes, section: str):
        self.data, self.section, self.position = data, section, 0

    def take(self, size: int) -> bytes:
        piece = self.data[self.position : self.position + size]
        if len(piece) != size:
            raise UserError(f"damaged, section {self.section!r} ends early: {size} bytes expected, {len(piece)} left")
        self.position += size
        return piece

    def finish(self) -> None:
        if self.position != len(self.data):
            left = len(self.data) - self.position
            raise UserError(f"damaged, section {self.section!r} has {left} bytes more than the network needs")


def _read(data: bytes, model: str | None) -> tuple[nn.Module, ArchiveReport]:
    description = read_description(data)
    _check_format(description)
    sections = unpack_sections(data, description)
    _check_description(description, sections)
    images = read_image_spec(description, num_classes=description["num_classes"])
    description = {**description, "model": trusted_model(description["model"], model)}
    identity = {"name": description["model"], "num_classes": description["num_classes"]}
    dense = build_on_meta(**identity)
    kept = _unpack_kept(dense, sections["kept"])
    network = _cut(dense, kept, images)
    cursors = {name: _Cursor(sections[name], name) for name in SECTIONS if name != "kept"}
    state, coded = {}, {}
    expected = network.state_dict()
    for (name, tensor), dtype in zip(expected.items(), _dtypes(expected, description["dtypes"]), strict=True):
        state[name], coded[name] = _take_tensor(cursors, tensor, dtype)
    for cursor in cursors.values():
        cursor.finish()
    report = _report(description, dense, state, coded, file_bytes=len(data), images=images)
    if description["model"] not in MODELS:  # it may hold tensors beside its state, which now cost no more than the file
        with preserved_random_state():
            dense = build_model(**identity)
        network = _cut(dense, kept, images)
    network.load_state_dict(with_versions(state, like=expected), assign=True)
    return network.eval(), report


def _cut(dense: nn.Module, kept: Mapping[str, Sequence[int]], images: ImageSpec | None) -> nn.Module:
    return Selection.literal(ChannelGraph(dense, example_images(dense, images)), kept).shrink() if kept else dense


def _check_format(description: Mapping[str, Any]) -> None:
    version = description.get("format")
    if type(version) is not int or version < 1:
        raise UserError(f"damaged, its format is {shown(version, SHOWN_VALUE)}, expected a number")
    if version > FORMAT:
        raise UserError(f"has format {shown(version, SHOWN_VALUE)}, newer than format {FORMAT} that this program reads")


def _check_description(description: Mapping[str, Any], sections: Mapping[str, bytes]) -> None:
    if set(sections) != set(SECTIONS):
        raise UserError(
            f"damaged, it holds the sections {printable(', '.join(sorted(sections)))}, expected {', '.join(SECTIONS)}"
        )
    images = FIELDS if description["format"] > PLAIN_FORMAT else ()
    if set(description) - {GREY_BITS_FIELD} != {"format", "model", "num_classes", "dtypes", "sha256", *images}:
        raise UserError(f"damaged, its description names {printable(', '.join(description))}")
    if not isinstance(description["model"], str):
        raise UserError(f"damaged, its network is {shown(description['model'], SHOWN_VALUE)}, expected a name")
    classes = description["num_classes"]
    if type(classes) is int and classes > MAX_CLASSES:
        raise UserError(f"has {shown(classes, SHOWN_VALUE)} classes, at most {MAX_CLASSES:,} are read")
    if type(classes) is not int or not 1 <= classes <= len(sections["uncoded"]):  # each class has a bias, stored as it is
        raise UserError(
            f"damaged, {shown(classes, SHOWN_VALUE)} classes do not fit into {len(sections['uncoded'])} bytes of biases"
        )


def _take_tensor(cursors: Mapping[str, _Cursor], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, CodedTensor | None]:
    """The next tensor of the file, with the shape of `like`."""
    words = f"<u{dtype.itemsize}"
    coded = None
    entries, payload_bytes = 0, 0
    if like.dim() > 1:
        entries, payload_bytes = np.frombuffer(cursors["layers"].take(LAYER_ROW.itemsize), LAYER_ROW)[0].tolist()
    if entries:
        codebook = np.frombuffer(cursors["codebooks"].take(entries * dtype.itemsize), words)
        code_lengths = _unpack_lengths(cursors["code_lengths"].take(_packed_bytes(LENGTH_BITS * entries)), entries)
        payload = cursors["payload"].take(payload_bytes)
        symbols = huffman.decode(payload, code_lengths, like.numel())
        coded = CodedTensor(codebook, code_lengths, payload, np.bincount(symbols, minlength=entries))
        values = codebook[symbols]
    elif payload_bytes:
        raise UserError(f"damaged, a layer without codebook has {payload_bytes} bytes of payload")
    else:
        values = np.frombuffer(bytearray(cursors["uncoded"].take(like.numel() * dtype.itemsize)), words)
    return torch.from_numpy(values.view(np.uint8)).view(dtype).view(like.shape), coded


def _dtypes(expected: Mapping[str, Tensor], unusual: Any) -> list[torch.dtype]:
    """The element type of each tensor; `unusual` is what the file says of those that differ from the architecture's."""
    dtypes = [tensor.dtype for tensor in expected.values()]
    if not isinstance(unusual, dict) or not set(unusual) <= set(FLOAT_TYPES):
        raise UserError(f"damaged, its element types are {shown(unusual, SHOWN_VALUE)}, known are {', '.join(FLOAT_TYPES)}")
    for name, positions in unusual.items():
        if not isinstance(positions, list) or not all(_is_float_position(position, dtypes) for position in positions):
            raise UserError(f"damaged, tensors of type {name} are {shown(positions, SHOWN_VALUE)}, expected positions of such")
        for position in positions:
            dtypes[position] = FLOAT_TYPES[name]
    return dtypes


def _is_float_position(position: Any, dtypes: Sequence[torch.dtype]) -> bool:
    return type(position) is int and 0 <= position < len(dtypes) and dtypes[position].is_floating_point


# ---- both ways ---------------------------------------------------------------------------------------------------------


def _packed_bytes(bits: int) -> int:
    return (bits + 7) // 8


def _pack_lengths(lengths: np.ndarray) -> bytes:
    return np.packbits(np.unpackbits(lengths[:, None], axis=1)[:, 8 - LENGTH_BITS :]).tobytes()


def _unpack_lengths(data: bytes, count: int) -> np.ndarray:
    bits = _unpack_bits(data, LENGTH_BITS * count, "code_lengths").reshape(count, LENGTH_BITS)
    return np.packbits(bits, axis=1)[:, 0] >> (8 - LENGTH_BITS)


def _unpack_bits(data: bytes, count: int, section: str) -> np.ndarray:
    """The first `count` bits, as uint8; whatever fills the last byte must be zero."""
    if _packed_bytes(count) != len(data):
        raise UserError(f"damaged, section {section!r} has {len(data)} bytes where {_packed_bytes(count)} are expected")
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if bits[count:].any():
        raise UserError(f"damaged, section {section!r} does not end in zero padding")
    return bits[:count]


def _pack_kept(dense: nn.Module, kept: Mapping[str, Sequence[int]]) -> bytes:
    """One bit for each layer that has channels: is it narrow? Then, for each narrow one, a bit for each channel: is it kept?"""
    widths = _layer_widths(dense)
    masks = [np.isin(np.arange(widths[name]), kept[name]) for name in widths if name in kept]
    return np.packbits(np.concatenate([[name in kept for name in widths], *masks]).astype(np.uint8)).tobytes()


def _unpack_kept(dense: nn.Module, data: bytes) -> dict[str, list[int]]:
    widths = _layer_widths(dense)
    listed = np.unpackbits(np.frombuffer(data[: _packed_bytes(len(widths))], np.uint8)).tolist()
    names = [name for name, is_narrow in zip(widths, listed, strict=False) if is_narrow]
    masks = _unpack_bits(data, len(widths) + sum(widths[name] for name in names), "kept")[len(widths) :]
    pieces = np.split(masks, np.cumsum([widths[name] for name in names])[:-1]) if names else []
    return {name: np.flatnonzero(piece).tolist() for name, piece in zip(names, pieces, strict=True)}


def _layer_widths(dense: nn.Module) -> dict[str, int]:
    """Output channels by layer, in the order of the network's definition."""
    widths = {name: output_channels(module) for name, module in dense.named_modules()}
    return {name: width for name, width in widths.items() if width is not None}


def _same(first: Tensor, second: Tensor) -> bool:
    return (first.dtype, first.shape) == (second.dtype, second.shape) and np.array_equal(_words(first), _words(second))


def _report(
    description: Mapping[str, Any],
    dense: nn.Module,
    state: Mapping[str, Tensor],
    coded: Mapping[str, CodedTensor | None],
    *,
    file_bytes: int,
    images: ImageSpec | None,
) -> ArchiveReport:
    layers = tuple(
        _layer_size(name, tensor, state.get(name), coded.get(name))
        for name, tensor in dense.state_dict().items()
        if tensor.dim() > 1
    )
    uncoded = sum(tensor.nbytes for tensor in state.values() if tensor.dim() < 2)
    return ArchiveReport(description["model"], description["num_classes"], layers, uncoded, file_bytes, images)


def _layer_size(name: str, dense: Tensor, stored: Tensor | None, coded: CodedTensor | None) -> LayerSize:
    """Sizes of one weight; `stored` is None where nothing is left of the layer."""
    if stored is None:
        return LayerSize(name, dense.nbytes, 0, 0, 0, 0.0, 0, 0)
    weights, nonzero = stored.numel(), int(torch.count_nonzero(stored))
    if coded is None:
        return LayerSize(name, dense.nbytes, weights, nonzero, 0, 8.0 * stored.nbytes, stored.nbytes, stored.nbytes)
    shannon_bits = huffman.entropy_bits(coded.frequencies)
    return LayerSize(
        name, dense.nbytes, weights, nonzero, coded.codebook.size, shannon_bits, len(coded.payload), coded.coded_bytes
    )
