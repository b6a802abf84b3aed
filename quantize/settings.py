"""How a network is quantized, without anything that has to be imported for it."""

from collections.abc import Sequence
from dataclasses import dataclass

QUAN_MODES = ("all-quan", "conv-quan", "fc-quan")  # which layers share weights; `quantize.codebook` has their kinds
SHORT_MODES = tuple(mode.removesuffix("-quan") for mode in QUAN_MODES)
INT8 = "int8"  # a mode beside those that share weights


@dataclass(frozen=True)
class QuantizationSettings:
    """`mode` says which layers share weights, `bits` how many, as `quantize.codebook.layer_bits` takes them; int8 has none."""

    mode: str = "all-quan"
    bits: Sequence[str] = ("5",)

    @property
    def is_int8(self) -> bool:
        """Whether all layers are trained in simulated eight bits, instead of sharing weights."""
        return self.mode == INT8


CODECS = HUFFMAN, TRELLIS = "huffman", "trellis"
MAX_DROP = 0.3  # points of top-1, where neither bound is given


@dataclass(frozen=True)
class CodecSettings:
    """What the second codec may take or lose: bytes of the file, or points of top-1 on held-out training images; one of them."""

    max_bytes: int | None = None
    max_drop: float = MAX_DROP

    def __str__(self) -> str:
        return f"at most {self.max_bytes:,} bytes" if self.max_bytes is not None else f"at most {self.max_drop:g} points lost"
