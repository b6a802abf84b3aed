"""What every network of `models` returns beside its logits, so that distillation reads one structure only."""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """Feature maps of one forward pass, all of them after their activation and still attached to the graph.

    `logits` is (B, classes); `stages` holds the last map of each stage, (B, C, H, W); `blocks` holds one map a residual
    block in order of depth (for a network without residual blocks one map a convolution), the stem excluded;
    `embedding` is (B, D), what the classifier reads.
    """

    logits: Tensor
    stages: tuple[Tensor, ...]
    blocks: tuple[Tensor, ...]
    embedding: Tensor
