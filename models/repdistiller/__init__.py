"""The networks for 32x32 images that papers on distillation pair on CIFAR-100, one file a family.

Names, layers and state_dict keys are those of RepDistiller (github.com/HobbitLong/RepDistiller), which mdistiller and others took
over, so that checkpoints trained there load. `stages` are the maps that its losses compare, without the stem's and the embedding.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Each network's class, as `module:Class` of this package, and what it is built with; the names are known without torch.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"resnet{depth}": ("resnet:ProjectionResNet", {"depth": depth}) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": ("resnet:ProjectionResNet", {"depth": depth, "widths": (32, 64, 128, 256)}) for depth in (8, 32)},
    **{
        f"wrn_{depth}_{widen}": ("wide_resnet:WideResNet", {"depth": depth, "widen": widen})
        for depth in (16, 40)
        for widen in (1, 2)
    },
    "vgg8": ("vgg:VGG", {"convolutions": (1, 1, 1, 1, 1)}),
    "vgg13": ("vgg:VGG", {"convolutions": (2, 2, 2, 2, 2)}),
    "MobileNetV2": ("mobilenet_v2:MobileNetV2", {}),
    "ShuffleV1": ("shufflenet_v1:ShuffleNetV1", {}),
    "ShuffleV2": ("shufflenet_v2:ShuffleNetV2", {}),
}


def build_repdistiller(name: str, *, num_classes: int) -> nn.Module:
    """A new network of one of the names in NETWORKS."""
    place, options = NETWORKS[name]
    module, _, kind = place.partition(":")
    return getattr(import_module(f"{__name__}.{module}"), kind)(num_classes=num_classes, **options)
