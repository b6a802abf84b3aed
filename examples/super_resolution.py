"""A super-resolution network with residual blocks and pixel shuffle: pruned, mended by least squares, taught by itself.

PYTHONPATH=. python3 examples/super_resolution.py [STEPS]
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import filter_pruning as fp


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def edsr(width: int = 32) -> nn.Module:
    """Lim et al., "EDSR", CVPR workshops 2017, made small: images (B, 1, H, W) to (B, 1, 2 H, 2 W)."""
    ends = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
    return nn.Sequential(ends[0], *(Block(width) for _ in range(3)), ends[1], nn.PixelShuffle(2))


def stripes(seed: int) -> tuple[Tensor, Tensor]:
    """Random stripes at low (16, 1, 16, 16) and high resolution (16, 1, 32, 32)."""
    random, axis = torch.Generator().manual_seed(seed), torch.arange(32.0)
    x, y, phase = torch.randn(3, 16, 1, 1, 1, generator=random).unbind()
    high = torch.sin(0.4 * (axis * x + axis[:, None] * y) + 6 * phase)
    return F.avg_pool2d(high, 2), high


def train(network: nn.Module, steps: int, *, lr: float, teacher: nn.Module | None = None) -> None:
    optimizer = torch.optim.Adam(network.train().parameters(), lr=lr)
    for low, high in map(stripes, range(steps)):
        with torch.no_grad():
            target = high if teacher is None else (high + teacher(low)) / 2
        optimizer.zero_grad()
        F.l1_loss(network(low), target).backward()
        optimizer.step()


@torch.no_grad()
def psnr(network: nn.Module) -> float:
    low, high = stripes(10**6)
    return float(10 * torch.log10(4 / F.mse_loss(network.eval()(low), high)))  # of numbers from -1 to 1


steps, network = int([*sys.argv, 100][1]), edsr()
train(network, steps, lr=2e-3)
small = fp.prune(network.eval(), stripes(0)[0], criterion="fpgm", budget="params=0.5")
pruned = psnr(small)
fp.reconstruct(small, network, [stripes(seed)[0] for seed in range(8)])
mended = psnr(small)
train(small, steps // 2, lr=5e-4, teacher=network)
print(f"PSNR {psnr(network):.2f}, pruned {pruned:.2f}, mended {mended:.2f}, trained on {psnr(small):.2f}")
