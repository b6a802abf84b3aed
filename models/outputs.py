"""What every network of `models` returns beside its logits, so that distillation reads one structure only."""

from typing import NamedTuple

from torch import Tensor, nn


class Outputs(NamedTuple):
    """Feature maps of one forward pass, all of them after their activation and still attached to the graph.

    `logits` is (B, classes); `stages` holds the last map of each stage, (B, C, H, W); `blocks` holds one map a residual
    block in order of depth (for a network without residual blocks one map a convolution), the stem excluded;
    `embedding` is (B, D), what the classifier reads. Beside logits that alone were asked for, the others are empty.
    """

    logits: Tensor
    stages: tuple[Tensor, ...] = ()
    blocks: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None


def has_outputs(network: nn.Module, images: Tensor | None = None) -> bool:
    """Whether the network has the method `outputs(x)`, and feature maps for it; a layer of that name is none.

    `images` (B, C, H, W) are like those that it will get, where that is known.
    """
    outputs = getattr(network, "outputs", None)
    if not callable(outputs) or isinstance(outputs, nn.Module):
        return False
    finds = getattr(network, "finds_feature_maps", None)  # of a network whose maps are looked for, `models.graph.features`
    return finds is None or finds(images)


def outputs_run_graph(network: nn.Module) -> bool:
    """Whether `outputs(x)` is not the network's own method but the graph of its forward pass, `models.graph.features`."""
    return hasattr(network, "finds_feature_maps")
