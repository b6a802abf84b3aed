"""ResNets for 32x32 images: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

Depth is 6n + 2: a stem, three stages of n basic blocks with 16, 32 and 64 channels, one linear layer. Shortcuts are
option A of the paper: stride-2 subsampling and zero-padded channels, without parameters. Convolutions start from normal
values of variance 2 / fan-out (He et al., ICCV 2015, eq. 14), as in the published codes of this field.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import Outputs

STAGE_WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, then ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int):
        super().__init__()
        self.conv_a = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn_a = nn.BatchNorm2d(out_channels)
        self.conv_b = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn_b = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn_a(self.conv_a(x)))
        residual = self.bn_b(self.conv_b(residual))
        return F.relu(self.shortcut(x) + residual)

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.new_channels == 0:
            return x
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


class CifarResNet(nn.Module):
    """A ResNet of depth 6n + 2 over (B, 3, 32, 32) images; any other even size works too, the pooling is global."""

    def __init__(self, *, depth: int, num_classes: int):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has depth 6n + 2, not {depth}")
        blocks = (depth - 2) // 6
        self.conv_1_3x3 = nn.Conv2d(3, STAGE_WIDTHS[0], 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(STAGE_WIDTHS[0])
        self.stage_1 = _stage(STAGE_WIDTHS[0], STAGE_WIDTHS[0], blocks=blocks, stride=1)
        self.stage_2 = _stage(STAGE_WIDTHS[0], STAGE_WIDTHS[1], blocks=blocks, stride=2)
        self.stage_3 = _stage(STAGE_WIDTHS[1], STAGE_WIDTHS[2], blocks=blocks, stride=2)
        self.classifier = nn.Linear(STAGE_WIDTHS[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        x = F.relu(self.bn_1(self.conv_1_3x3(x)))  # (B, 16, H, W)
        stages, blocks = [], []
        for stage in (self.stage_1, self.stage_2, self.stage_3):
            for block in stage:
                x = block(x)
                blocks.append(x)
            stages.append(x)
        embedding = x.mean((2, 3))  # (B, 64)
        return Outputs(self.classifier(embedding), tuple(stages), tuple(blocks), embedding)


def _stage(in_channels: int, out_channels: int, *, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride=stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1)))
