"""A UNet that segments shapes, in a loop of its own: pruned to half of its MACs, mended without labels, trained on.

PYTHONPATH=. python3 examples/segmentation.py [STEPS]
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import filter_pruning as fp


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Ronneberger et al., "U-Net", MICCAI 2015, with three levels: images (B, 1, H, W) to logits of the same shape."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.down = nn.ModuleList([block(1, width), block(width, 2 * width), block(2 * width, 4 * width)])
        self.up, self.head = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)]), nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        second = self.down[1](F.max_pool2d(first := self.down[0](x), 2))
        x = self.up[0](torch.cat([F.interpolate(self.down[2](F.max_pool2d(second, 2)), scale_factor=2.0), second], 1))
        return self.head(self.up[1](torch.cat([F.interpolate(x, scale_factor=2.0), first], 1)))


def discs(seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (16, 1, 32, 32) of a disc each, and where it is."""
    random, axis = torch.Generator().manual_seed(seed), torch.linspace(0, 1, 32)
    x, y, radius = (torch.rand(3, 16, 1, 1, 1, generator=random) * 0.6 + 0.2).unbind()
    mask = ((axis - x).square() + (axis[:, None] - y).square() < (radius / 2).square()).float()
    return mask + 0.8 * torch.randn(mask.shape, generator=random), mask


def train(network: nn.Module, steps: int, *, lr: float) -> None:
    optimizer = torch.optim.Adam(network.train().parameters(), lr=lr)
    for images, masks in map(discs, range(steps)):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network(images), masks).backward()
        optimizer.step()


@torch.no_grad()
def iou(network: nn.Module) -> float:
    images, masks = discs(10**6)
    found = (network.eval()(images) > 0).float()
    return float((found * masks).sum() / torch.maximum(found, masks).sum())


steps, network = int([*sys.argv, 100][1]), UNet()
train(network, steps, lr=3e-3)
small = fp.prune(network.eval(), discs(0)[0], budget="macs=0.5")
pruned = iou(small)
fp.reconstruct(small, network, [discs(seed)[0] for seed in range(8)])
mended = iou(small)
train(small, steps // 2, lr=1e-3)
print(f"IoU {iou(network):.3f}, pruned {pruned:.3f}, mended {mended:.3f}, trained on {iou(small):.3f}")
