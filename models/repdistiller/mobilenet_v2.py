"""MobileNetV2 of half width for 32x32 images: Sandler et al., CVPR 2018, as RepDistiller builds it (its `mobile_half`).

The stem has stride 2, the second group of blocks none, so that 32x32 images end as maps of 2x2. What a block puts out has no
activation behind it. `stages` are the last maps of the four resolutions' groups that RepDistiller compares.
"""

from torch import Tensor, nn

from models.outputs import Outputs
from models.repdistiller.parts import init_classifier, init_convolutions

WIDTH_SHARE = 0.5
STEM_CHANNELS, LAST_CHANNELS = 32, 1280  # before the share, which the last layer has not
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STAGES = (1, 2, 4, 6)  # groups at whose end a stage does


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, depthwise 3x3, 1x1 back; plus the input where it has the same shape."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, expansion: int):
        super().__init__()
        inner = in_channels * expansion
        self.adds_input = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds_input else self.conv(x)


class MobileNetV2(nn.Module):
    """Over (B, 3, H, W) images."""

    def __init__(self, *, num_classes: int):
        super().__init__()
        channels = int(STEM_CHANNELS * WIDTH_SHARE)
        self.conv1 = _conv_norm(3, channels, 3, stride=2)
        self.blocks = nn.ModuleList()
        for expansion, full_width, count, stride in GROUPS:
            width = int(full_width * WIDTH_SHARE)
            first = InvertedResidual(channels, width, stride=stride, expansion=expansion)
            others = (InvertedResidual(width, width, stride=1, expansion=expansion) for _ in range(count - 1))
            self.blocks.append(nn.Sequential(first, *others))
            channels = width
        self.conv2 = _conv_norm(channels, LAST_CHANNELS, 1, stride=1)
        self.classifier = nn.Sequential(nn.Linear(LAST_CHANNELS, num_classes))
        init_convolutions(self)
        init_classifier(self.classifier[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        x = self.conv1(x)
        stages, blocks = [], []
        for position, group in enumerate(self.blocks):
            for block in group:
                x = block(x)
                blocks.append(x)
            if position in STAGES:
                stages.append(x)
        embedding = self.conv2(x).mean((2, 3))
        return Outputs(self.classifier(embedding), tuple(stages), tuple(blocks), embedding)


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int, *, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())
