"""What the formats of an archive have in common: the network that one is for, its kept channels, the types of its tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.graph import ChannelGraph, output_channels
from models.narrow import Selection
from models.network_file import example_images
from utils.errors import UserError, shown
from utils.images.spec import ImageSpec

SHOWN_VALUE = 80
FLOAT_TYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


def bit_patterns(tensor: Tensor) -> np.ndarray:
    """The elements' bit patterns as little-endian unsigned integers, (N,)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")


def unusual_dtypes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, list[int]]:
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


def check_fits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], wanted: str) -> None:
    for name in {**expected, **state}:
        ours, theirs = (str(tuple(tensors[name].shape)) if name in tensors else "absent" for tensors in (state, expected))
        if ours != theirs:
            raise UserError(f"cannot archive the network as {wanted}: {name} is {ours}, expected {theirs}")


class Cursor:
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


def cut_network(dense: nn.Module, kept: Mapping[str, Sequence[int]], images: ImageSpec | None) -> nn.Module:
    return Selection.literal(ChannelGraph(dense, example_images(dense, images)), kept).shrink() if kept else dense


def element_types(expected: Mapping[str, Tensor], unusual: Any) -> list[torch.dtype]:
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


def packed_bytes(bits: int) -> int:
    return (bits + 7) // 8


def unpack_bits(data: bytes, count: int, section: str) -> np.ndarray:
    """The first `count` bits, as uint8; whatever fills the last byte must be zero."""
    if packed_bytes(count) != len(data):
        raise UserError(f"damaged, section {section!r} has {len(data)} bytes where {packed_bytes(count)} are expected")
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if bits[count:].any():
        raise UserError(f"damaged, section {section!r} does not end in zero padding")
    return bits[:count]


def pack_kept(dense: nn.Module, kept: Mapping[str, Sequence[int]]) -> bytes:
    """One bit for each layer that has channels: is it narrow? Then, for each narrow one, a bit for each channel: is it kept?"""
    widths = _layer_widths(dense)
    masks = [np.isin(np.arange(widths[name]), kept[name]) for name in widths if name in kept]
    return np.packbits(np.concatenate([[name in kept for name in widths], *masks]).astype(np.uint8)).tobytes()


def unpack_kept(dense: nn.Module, data: bytes) -> dict[str, list[int]]:
    widths = _layer_widths(dense)
    listed = np.unpackbits(np.frombuffer(data[: packed_bytes(len(widths))], np.uint8)).tolist()
    names = [name for name, is_narrow in zip(widths, listed, strict=False) if is_narrow]
    masks = unpack_bits(data, len(widths) + sum(widths[name] for name in names), "kept")[len(widths) :]
    pieces = np.split(masks, np.cumsum([widths[name] for name in names])[:-1]) if names else []
    return {name: np.flatnonzero(piece).tolist() for name, piece in zip(names, pieces, strict=True)}


def _layer_widths(dense: nn.Module) -> dict[str, int]:
    """Output channels by layer, in the order of the network's definition."""
    widths = {name: output_channels(module) for name, module in dense.named_modules()}
    return {name: width for name, width in widths.items() if width is not None}
