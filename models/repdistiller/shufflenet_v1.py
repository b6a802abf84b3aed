"""ShuffleNet V1 with three groups for 32x32 images: Zhang et al., CVPR 2018, as RepDistiller builds it, with a 1x1 stem."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import Outputs
from models.repdistiller.parts import shuffle_channels

GROUPS = 3
STEM_CHANNELS = 24
STAGES = ((240, 4), (480, 8), (960, 4))  # channels and units


class Unit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; beside the pooled input at stride 2, plus the input otherwise."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int):
        super().__init__()
        self.stride = stride
        own = out_channels - in_channels if stride == 2 else out_channels
        inner = own // 4
        self.groups = 1 if in_channels == STEM_CHANNELS else GROUPS
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, own, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(own)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        if self.groups > 1:
            inner = shuffle_channels(inner, self.groups)
        inner = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(inner)))))
        if self.stride == 1:
            return F.relu(inner + x)
        return F.relu(torch.cat([inner, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))


class ShuffleNetV1(nn.Module):
    """Over (B, 3, H, W) images."""

    def __init__(self, *, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        inputs = (STEM_CHANNELS, *(width for width, _ in STAGES))
        self.layer1, self.layer2, self.layer3 = (
            _stage(in_channels, width, units=units) for in_channels, (width, units) in zip(inputs, STAGES, strict=False)
        )
        self.linear = nn.Linear(STAGES[-1][0], num_classes)

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
        embedding = x.mean((2, 3))
        return Outputs(self.linear(embedding), tuple(stages), tuple(blocks), embedding)


def _stage(in_channels: int, out_channels: int, *, units: int) -> nn.Sequential:
    first = Unit(in_channels, out_channels, stride=2)
    return nn.Sequential(first, *(Unit(out_channels, out_channels, stride=1) for _ in range(units - 1)))
