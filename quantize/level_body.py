"""The inside of an archive whose weights are levels of steps (format 3): tensors to sections and back.

docs/formats.md describes the bytes. Everything that a reader takes from the file is a whole number; what they stand for
follows by multiplications that every machine rounds alike.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize.compression import CodedWeight
from quantize.huffman import entropy_bits
from quantize.layout import SHOWN_VALUE, Cursor, bit_patterns
from quantize.level_coder import Rows, Stream, decode_rows, encode_rows
from quantize.table import LayerSize, plain_size
from utils.errors import UserError, shown

SECTIONS = ("words", "signs", "roles", "uncoded")
PLAIN, WEIGHT, SHIFT, FILL = 0, 1, 2, 3  # what a tensor is; a fill with its number added
MAX_FILLS = 16
EXPONENT_LIMIT = 400  # quarters of an octave: no value comes near the ends of float32


def pack(
    state: Mapping[str, Tensor], weights: Mapping[str, CodedWeight]
) -> tuple[list[float], dict[str, bytes], dict[str, LayerSize]]:
    """The values of constant tensors, the sections, and what each tensor takes. `weights` are of tensors of `state`."""
    places = {name: place for place, name in enumerate(state)}
    shifts = {coded.shift for coded in weights.values() if coded.shift is not None}
    roles, fills, uncoded = [], [], bytearray()
    for name, tensor in state.items():
        fill = None if name in weights or name in shifts else _fill(tensor, fills)
        if name in weights:
            roles.append(WEIGHT)
        elif name in shifts:
            roles.append(SHIFT)
        elif fill is not None:
            roles.append(FILL + fill)
        else:
            roles.append(PLAIN)
            uncoded += bit_patterns(tensor).tobytes()
    ordered = {name: weights[name] for name in state if name in weights}
    offsets = [places[coded.shift] - places[name] if coded.shift is not None else 0 for name, coded in ordered.items()]
    packed_roles = zlib.compress(bytes(roles) + np.array(offsets, "<i2").tobytes(), 9)
    forms = [_Form.of(coded) for coded in ordered.values()]
    pieces = [piece for coded in ordered.values() for piece in _numbers_of(coded)]
    stream, bits = encode_rows(np.concatenate(pieces) if pieces else np.zeros(0, np.int64), _rows(forms))
    sections = {"words": stream.words, "signs": stream.signs, "roles": packed_roles, "uncoded": bytes(uncoded)}
    return fills, sections, _sizes(state, ordered, forms, roles, bits)


def unpack(
    sections: Mapping[str, bytes], expected: Mapping[str, Tensor], types: Mapping[str, torch.dtype], *, fills: Any
) -> tuple[dict[str, Tensor], dict[str, LayerSize]]:
    """The tensors with the shapes of `expected`, and what each takes. Raises UserError for what `pack` did not write."""
    fills = _checked_fills(fills)
    roles, shifts = _read_roles(sections["roles"], expected, types, fills)
    names = [name for name, role in zip(expected, roles, strict=True) if role == WEIGHT]
    forms = [_Form.like(expected[name], has_shift=name in shifts) for name in names]
    rows = _rows(forms)
    numbers, bits = decode_rows(Stream(sections["words"], sections["signs"]), rows)
    cursor = Cursor(sections["uncoded"], "uncoded")
    state, weights, position = {}, {}, 0
    for name, form in zip(names, forms, strict=True):
        weights[name] = coded = form.coded(numbers[position : position + form.total], shift=shifts.get(name))
        position += form.total
        weight, shift = coded.values()
        state[name] = torch.from_numpy(weight).to(types[name]).reshape(expected[name].shape)
        if shift is not None:
            state[coded.shift] = torch.from_numpy(shift).to(types[coded.shift])
    for (name, like), role in zip(expected.items(), roles, strict=True):
        if role >= FILL:
            state[name] = torch.full(like.shape, fills[role - FILL], dtype=types[name])
        elif role == PLAIN:
            words = np.frombuffer(bytearray(cursor.take(like.numel() * types[name].itemsize)), np.uint8)
            state[name] = torch.from_numpy(words).view(types[name]).view(like.shape)
    cursor.finish()
    state = {name: state[name] for name in expected}
    return state, _sizes(state, weights, forms, roles, bits)


# ---- weights as rows of numbers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """The sizes of a coded weight: F rows of C channels and K places in the kernel, with a shift or without one."""

    outputs: int
    channels: int
    places: int
    has_shift: bool

    @classmethod
    def of(cls, coded: CodedWeight) -> "_Form":
        return cls(len(coded.levels), len(coded.channel_exponents), len(coded.kernel_exponents), coded.shift is not None)

    @classmethod
    def like(cls, weight: Tensor, *, has_shift: bool) -> "_Form":
        return cls(weight.shape[0], weight.shape[1], weight.shape[2:].numel(), has_shift)

    @property
    def lengths(self) -> list[int]:
        """Of its rows: the levels of each output, the shifts, the exponents."""
        exponents = self.outputs + self.channels + self.places + self.has_shift + 1
        return [self.channels * self.places] * self.outputs + [self.outputs] * self.has_shift + [exponents]

    @property
    def total(self) -> int:
        return sum(self.lengths)

    def coded(self, numbers: np.ndarray, *, shift: str | None) -> CodedWeight:
        """The weight of `numbers` (total,). Raises UserError for exponents out of bounds."""
        count = self.outputs * self.channels * self.places
        levels = numbers[:count].reshape(self.outputs, -1)
        if self.has_shift:
            levels = np.column_stack([levels, numbers[count : count + self.outputs]])
        exponents = numbers[len(numbers) - self.lengths[-1] :].astype(np.int64)
        rows, channels, places, ends = np.split(exponents, np.cumsum([self.outputs, self.channels, self.places]).tolist())
        coded = CodedWeight(levels, rows + ends[-1], channels, places, shift, int(ends[0]) if self.has_shift else 0)
        sums = coded.row_exponents[:, None] + coded.column_exponents()
        if sums.size and (np.abs(coded.row_exponents).max() > EXPONENT_LIMIT or np.abs(sums).max() > EXPONENT_LIMIT):
            raise UserError(f"damaged, its steps go beyond 2^{EXPONENT_LIMIT // 4}")
        return coded


def _numbers_of(coded: CodedWeight) -> list[np.ndarray]:
    """The numbers of its rows, in order; the rows' exponents relative to their median, which comes last."""
    middle = int(np.median(coded.row_exponents)) if coded.row_exponents.size else 0
    shift = [coded.shift_exponent] if coded.shift is not None else []
    exponents = [coded.row_exponents - middle, coded.channel_exponents, coded.kernel_exponents, [*shift, middle]]
    if coded.shift is None:
        return [coded.levels.ravel(), *exponents]
    return [coded.levels[:, :-1].ravel(), coded.levels[:, -1], *exponents]


def _rows(forms: Sequence[_Form]) -> Rows:
    lengths = [np.array(form.lengths, np.int64) for form in forms]
    has_trellis = [np.arange(len(form.lengths)) < form.outputs for form in forms]
    empty = np.zeros(0, np.int64)
    return Rows(np.concatenate([empty, *lengths]), np.concatenate([empty.astype(bool), *has_trellis]))


# ---- what the tensors are ----------------------------------------------------------------------------------------------


def _fill(tensor: Tensor, fills: list[float]) -> int | None:
    """Which of the `fills` a small constant tensor holds, as far as there is room for its value."""
    if tensor.dim() > 1 or not tensor.numel() or not bool((tensor == tensor.flatten()[0]).all()):
        return None
    value = tensor.flatten()[0].item()
    if tensor.dtype == torch.bool or float(value) != value or (value == 0 and str(value).startswith("-")):
        return None
    if value not in fills:
        if len(fills) == MAX_FILLS:
            return None
        fills.append(float(value))
    return fills.index(value)


def _checked_fills(fills: Any) -> list[float]:
    if not isinstance(fills, list) or len(fills) > MAX_FILLS or not all(type(fill) is float for fill in fills):
        raise UserError(f"damaged, its fills are {shown(fills, SHOWN_VALUE)}, expected at most {MAX_FILLS} numbers")
    if not all(abs(fill) < 1 << 53 for fill in fills):  # not for NaN either
        raise UserError(f"damaged, its fills are {shown(fills, SHOWN_VALUE)}, expected numbers below 2^53")
    return fills


def _read_roles(
    data: bytes, expected: Mapping[str, Tensor], types: Mapping[str, torch.dtype], fills: Sequence[float]
) -> tuple[list[int], dict[str, str]]:
    """The role of each tensor, and the names of the weights that have a shift, each with that of its shift."""
    names = list(expected)
    plain = _inflated(data, at_most=3 * len(names))
    roles = list(plain[: len(names)])
    weights = [place for place, role in enumerate(roles) if role == WEIGHT]
    if len(plain) != len(names) + 2 * len(weights) or max(roles, default=0) >= FILL + len(fills):
        raise UserError("damaged, section 'roles' does not fit the network's tensors")
    offsets = np.frombuffer(plain, "<i2", offset=len(names)).tolist()
    shifts = {names[place]: place + offset for place, offset in zip(weights, offsets, strict=True) if offset}
    places = list(shifts.values())
    if sorted(places) != [place for place, role in enumerate(roles) if role == SHIFT]:
        raise UserError("damaged, section 'roles' names shifts that are none")
    shifts = {weight: names[place] for weight, place in shifts.items()}
    for name, role in zip(names, roles, strict=True):
        shape = expected[name].shape
        if role in (WEIGHT, SHIFT) and (not types[name].is_floating_point or len(shape) < 2 - (role == SHIFT)):
            raise UserError(f"damaged, {name} is said to hold levels")
        if name in shifts and expected[shifts[name]].shape != shape[:1]:
            raise UserError(f"damaged, {shifts[name]} is said to be the shift of {name}")
        if role >= FILL and not types[name].is_floating_point and fills[role - FILL] % 1:
            raise UserError(f"damaged, {name} cannot hold {fills[role - FILL]}")
    return roles, shifts


def _inflated(data: bytes, *, at_most: int) -> bytes:
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(data, at_most + 1)
    except zlib.error as error:
        raise UserError("damaged, section 'roles' cannot be inflated") from error
    if not inflate.eof or inflate.unused_data or len(plain) > at_most:
        raise UserError("damaged, section 'roles' does not end where it should")
    return plain


def _sizes(
    state: Mapping[str, Tensor],
    weights: Mapping[str, CodedWeight],
    forms: Sequence[_Form],
    roles: Sequence[int],
    bits: np.ndarray,
) -> dict[str, LayerSize]:
    """What each tensor takes: of the streams what its rows cost in them, where it is a weight or a shift."""
    sizes = {name: plain_size(name, tensor) for (name, tensor), role in zip(state.items(), roles, strict=True) if role == PLAIN}
    position = 0
    for (name, coded), form in zip(weights.items(), forms, strict=True):
        own = bits[position : position + len(form.lengths)]
        position += len(form.lengths)
        levels = coded.levels[:, : form.channels * form.places]
        _, frequencies = np.unique(levels, return_counts=True)
        coded_bytes = -(-int(np.ceil(own.sum())) // 8)
        payload = -(-int(np.ceil(own[: form.outputs].sum())) // 8)
        sizes[name] = LayerSize(
            name, state[name].nbytes, levels.size, int(np.count_nonzero(levels)), frequencies.size,
            entropy_bits(frequencies), payload, coded_bytes,
        )  # fmt: skip
    return sizes
