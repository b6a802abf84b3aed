"""A detector in the manner of SSD, with two heads on two maps: pruned by a loss of its own, trained on, saved and loaded.

PYTHONPATH=. python3 examples/detection.py [STEPS]
"""

import sys
import tempfile

import torch
from torch import Tensor, nn

import filter_pruning as fp


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Detector(nn.Module):
    """Liu et al., "SSD", ECCV 2016: for each cell of two maps the score of an object and its box."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.backbone = nn.ModuleList([nn.Sequential(block(1, width), block(width, 2 * width)), block(2 * width, 4 * width)])
        self.heads = nn.ModuleList([nn.Conv2d(channels, 5, 3, padding=1) for channels in (2 * width, 4 * width)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = [x := stage(x) for stage in self.backbone]
        cells = torch.cat([head(each).flatten(2) for head, each in zip(self.heads, maps, strict=True)], 2)  # (B, 5, cells)
        return {"scores": cells[:, 0], "boxes": cells[:, 1:]}


def squares(seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (16, 1, 32, 32) of a square each, and its (x, y, width, height) as shares of the image."""
    random, axis = torch.Generator().manual_seed(seed), torch.linspace(0, 1, 32)
    x, y, side = (torch.rand(3, 16, 1, 1, 1, generator=random) * 0.6 + 0.2).unbind()
    inside = ((axis - x).abs() < side / 4) & ((axis[:, None] - y).abs() < side / 4)
    return inside + 0.1 * torch.randn(inside.shape, generator=random), torch.cat([x, y, side / 2, side / 2], 1)[..., 0, 0]


def loss(found: dict[str, Tensor], box: Tensor) -> Tensor:
    """The distance of the boxes, weighed by how sure each cell is."""
    return (found["scores"].softmax(1) * (found["boxes"] - box[..., None]).square().sum(1)).sum(1).mean()


def train(network: nn.Module, steps: int, *, lr: float) -> None:
    optimizer = torch.optim.Adam(network.train().parameters(), lr=lr)
    for images, box in map(squares, range(steps)):
        optimizer.zero_grad()
        loss(network(images), box).backward()
        optimizer.step()


steps, network, (images, box) = int([*sys.argv, 100][1]), Detector(), squares(10**6)
train(network, steps, lr=3e-3)
small = fp.prune(network.eval(), images, criterion="nggm", budget="macs=0.5", loss=loss, batches=[squares(0), squares(1)])
losses = [loss(network(images), box), loss(small(images), box)]
train(small, steps // 2, lr=1e-3)
with tempfile.TemporaryDirectory() as folder:
    fp.save(small, f"{folder}/small.pt")
    losses.append(loss(fp.load(f"{folder}/small.pt", Detector).eval()(images), box))
print("loss {:.4f}, pruned {:.4f}, trained on {:.4f}".format(*torch.stack(losses).tolist()))
