"""VGG with batch norm for 32x32 images: Simonyan & Zisserman, ICLR 2015, as RepDistiller builds it, with one linear layer.

Five groups of 3x3 convolutions with 64, 128, 256, 512 and 512 channels, a 2x2 max pooling behind each of the first three, and a
global average in the end. `stages` are the last maps of the groups but the first.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import Outputs
from models.repdistiller.parts import init_classifier, init_convolutions

WIDTHS = (64, 128, 256, 512, 512)
POOLED_GROUPS = 3


class VGG(nn.Module):
    """Over (B, 3, H, W) images; `convolutions` counts those of each of the five groups."""

    def __init__(self, *, convolutions: Sequence[int], num_classes: int):
        super().__init__()
        widths = (3, *WIDTHS)
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            _group(widths[i], widths[i + 1], count=count) for i, count in enumerate(convolutions)
        )
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        init_convolutions(self)
        init_classifier(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        stages, blocks = [], []
        for position, group in enumerate((self.block0, self.block1, self.block2, self.block3, self.block4)):
            for layer in group:
                x = layer(x)
                if isinstance(layer, nn.ReLU):
                    blocks.append(x)
            x = F.relu(x)
            blocks.append(x)
            stages.append(x)
            if position < POOLED_GROUPS:
                x = F.max_pool2d(x, 2)
        embedding = x.mean((2, 3))
        return Outputs(self.classifier(embedding), tuple(stages[1:]), tuple(blocks), embedding)


def _group(in_channels: int, out_channels: int, *, count: int) -> nn.Sequential:
    """`count` times conv-BN-ReLU, without the last ReLU."""
    layers: list[nn.Module] = []
    for position in range(count):
        conv = nn.Conv2d(in_channels if position == 0 else out_channels, out_channels, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
