"""ShuffleNet V2 for 32x32 images: Ma et al., ECCV 2018, as RepDistiller builds it, with a 1x1 stem."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import Outputs
from models.repdistiller.parts import shuffle_channels

STEM_CHANNELS, LAST_CHANNELS = 24, 1024
STAGES = ((116, 3), (232, 7), (464, 3))  # channels, and units behind the first


class Unit(nn.Module):
    """Half of the channels as they are, the other through 1x1, depthwise 3x3 and 1x1; then shuffled."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, inner = x.chunk(2, dim=1)
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(inner)))))
        inner = F.relu(self.bn3(self.conv3(inner)))
        return shuffle_channels(torch.cat([kept, inner], dim=1), 2)


class DownUnit(nn.Module):
    """Two branches of stride 2 beside each other, then shuffled."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return shuffle_channels(torch.cat([left, right], dim=1), 2)


class ShuffleNetV2(nn.Module):
    """Over (B, 3, H, W) images."""

    def __init__(self, *, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        inputs = (STEM_CHANNELS, *(width for width, _ in STAGES))
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(DownUnit(in_channels, width), *(Unit(width) for _ in range(units)))
            for in_channels, (width, units) in zip(inputs, STAGES, strict=False)
        )
        self.conv2 = nn.Conv2d(STAGES[-1][0], LAST_CHANNELS, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(LAST_CHANNELS)
        self.linear = nn.Linear(LAST_CHANNELS, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        x = F.relu(self.bn1(self.conv1(x)))
        stages, blocks = [], []
        for stage in (self.layer1, self.layer2, self.layer3):
            for unit in stage:
                x = unit(x)
                blocks.append(x)
            stages.append(x)
        embedding = F.relu(self.bn2(self.conv2(x))).mean((2, 3))
        return Outputs(self.linear(embedding), tuple(stages), tuple(blocks), embedding)
