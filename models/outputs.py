"""What every network of `models` returns beside its logits, so that distillation reads one structure only."""

from typing import NamedTuple

from torch import Tensor, nn


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


def has_outputs(network: nn.Module) -> bool:
    """Whether the network has the method `outputs(x)`, and feature maps for it; a layer of that name is none."""
    outputs = getattr(network, "outputs", None)
    return callable(outputs) and not isinstance(outputs, nn.Module) and getattr(network, "has_feature_maps", True)
