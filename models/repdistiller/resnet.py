"""ResNets for 32x32 images with 1x1 convolutions as shortcuts: He et al., CVPR 2016, option B, as RepDistiller builds them.

Depth is 6n + 2: a stem, three stages of n basic blocks, one linear layer. `resnet8x4` has four times the channels.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import Outputs
from models.repdistiller.parts import init_convolutions


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, then ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + (x if self.downsample is None else self.downsample(x)))


class ProjectionResNet(nn.Module):
    """Over (B, 3, H, W) images; `widths` are the channels of the stem and of the three stages."""

    def __init__(self, *, depth: int, num_classes: int, widths: Sequence[int] = (16, 16, 32, 64)):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has depth 6n + 2, not {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[1], blocks=blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks=blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks=blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        x = F.relu(self.bn1(self.conv1(x)))
        stages, blocks = [], []
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = block(x)
                blocks.append(x)
            stages.append(x)
        embedding = x.mean((2, 3))
        return Outputs(self.fc(embedding), tuple(stages), tuple(blocks), embedding)


def _stage(in_channels: int, out_channels: int, *, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride=stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1)))
