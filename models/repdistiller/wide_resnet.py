"""Wide ResNets: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016, as RepDistiller builds them, without dropout.

Depth is 6n + 4: a stem, three stages of n blocks with 16, 32 and 64 channels times the widening factor, one linear layer. Norm
and ReLU come before each convolution, so what a block puts out is a sum without an activation; so are `stages` and `blocks`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import Outputs
from models.repdistiller.parts import init_convolutions


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, plus the input, or where channels change a 1x1 convolution of the activated input."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None  # the name that checkpoints have
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.convShortcut is None else self.convShortcut(activated))


class Stage(nn.Module):
    """Blocks under the name `layer`, as checkpoints have them."""

    def __init__(self, in_channels: int, out_channels: int, *, blocks: int, stride: int):
        super().__init__()
        first = PreActivationBlock(in_channels, out_channels, stride=stride)
        others = (PreActivationBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *others)


class WideResNet(nn.Module):
    """Over (B, 3, H, W) images."""

    def __init__(self, *, depth: int, widen: int, num_classes: int):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a Wide ResNet has depth 6n + 4, not {depth}")
        blocks, widths = (depth - 4) // 6, [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1 = Stage(widths[0], widths[1], blocks=blocks, stride=1)
        self.block2 = Stage(widths[1], widths[2], blocks=blocks, stride=2)
        self.block3 = Stage(widths[2], widths[3], blocks=blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        x = self.conv1(x)
        stages, blocks = [], []
        for stage in (self.block1, self.block2, self.block3):
            for block in stage.layer:
                x = block(x)
                blocks.append(x)
            stages.append(x)
        embedding = F.relu(self.bn1(x)).mean((2, 3))
        return Outputs(self.fc(embedding), tuple(stages), tuple(blocks), embedding)
