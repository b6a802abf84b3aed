"""Where the bytes of an archive go: per layer, in total, and beside Shannon's bound."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from utils.images.spec import ImageSpec


@dataclass(frozen=True)
class LayerSize:
    """One weight tensor. `original_bytes` is the dense layer; `stored_weights` are what is left of it, zeros among them.

    `codebook_entries` is 0 for a layer that is stored as it is, and `coded_bytes` then its plain size; otherwise
    `coded_bytes` is payload, codebook and code lengths together. `shannon_bits` is the order-0 bound for the payload.
    """

    name: str
    original_bytes: int
    stored_weights: int
    kept_weights: int  # not zero
    codebook_entries: int
    shannon_bits: float
    payload_bytes: int
    coded_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Payload bits for each stored weight."""
        return 8 * self.payload_bytes / max(self.stored_weights, 1)

    @property
    def ratio(self) -> float:
        """How many times smaller than the dense layer."""
        return self.original_bytes / max(self.coded_bytes, 1)


def plain_size(name: str, tensor: Tensor) -> LayerSize:
    """Of a tensor that is stored as it is."""
    return LayerSize(
        name,
        tensor.nbytes,
        tensor.numel(),
        int(torch.count_nonzero(tensor)),
        0,
        8.0 * tensor.nbytes,
        tensor.nbytes,
        tensor.nbytes,
    )


@dataclass(frozen=True)
class ArchiveReport:
    """The sizes of one archive, in bytes unless they say otherwise, and what it says of its network.

    `images` is None for an archive that does not say what its network must be given.
    """

    model: str
    num_classes: int
    layers: tuple[LayerSize, ...]
    uncoded_bytes: int  # batch normalisation, biases: exactly as they are
    file_bytes: int
    images: ImageSpec | None = None

    @property
    def total(self) -> LayerSize:
        """The weight tensors added up."""
        return _total(self.layers)

    @property
    def overhead_bytes(self) -> int:
        """What the file spends on itself: header, channel lists, layer table."""
        return self.file_bytes - self.uncoded_bytes - self.total.coded_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `summary.json`."""
        rows = [_row_dict(layer) for layer in (*self.layers, self.total)]
        return {
            "layers": rows[:-1],
            "total": rows[-1],
            "uncoded_bytes": self.uncoded_bytes,
            "overhead_bytes": self.overhead_bytes,
            "file_bytes": self.file_bytes,
        }

    def lines(self) -> list[str]:
        """The table as text, a line a layer."""
        width = max(len(layer.name) for layer in (*self.layers, self.total))
        columns = ("original bytes", "kept weights", "bits/weight", "Shannon", "coded bytes", "ratio")
        head = f"{'layer':{width}} " + " ".join(f"{column:>14}" for column in columns)
        rows = [_row_text(layer, width) for layer in (*self.layers, self.total)]
        rest = f"BN, biases and other tensors {self.uncoded_bytes} bytes, container {self.overhead_bytes} bytes, "
        return [head, *rows, f"{rest}file {self.file_bytes} bytes"]


def _total(layers: Iterable[LayerSize]) -> LayerSize:
    layers = list(layers)
    sizes = zip(*(list(asdict(layer).values())[1:] for layer in layers), strict=True)
    return LayerSize("total", *(sum(column) for column in sizes)) if layers else LayerSize("total", 0, 0, 0, 0, 0.0, 0, 0)


def _row_dict(layer: LayerSize) -> dict[str, Any]:
    return {**asdict(layer), "bits_per_weight": layer.bits_per_weight, "ratio": layer.ratio}


def _row_text(layer: LayerSize, width: int) -> str:
    shannon = layer.shannon_bits / max(layer.stored_weights, 1)
    return (
        f"{layer.name:{width}} {layer.original_bytes:14d} {layer.kept_weights:14d} {layer.bits_per_weight:14.3f} "
        f"{shannon:14.3f} {layer.coded_bytes:14d} {layer.ratio:14.2f}"
    )
