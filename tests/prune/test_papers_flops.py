"""What papers count, worked out by hand and against a published figure."""

import copy

import pytest
import torch
from torch import nn

from models.cifar_resnet import CifarResNet
from models.graph import ChannelGraph
from prune.papers_flops import papers_flops_drop

IMAGE = torch.randn(1, 3, 8, 8)


def chain(first: int, second: int) -> nn.Module:
    """Two 3x3 convolutions, the second one with stride 2, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second, 5),
    )


def test_papers_flops_drop_by_hand():
    dense, small = chain(4, 6), chain(3, 2)
    before = 64 * 3 * 4 * 9 + 16 * 4 * 6 * 9
    after = 64 * 3 * 4 * 9 * 3 / 4 + 16 * 4 * 6 * 9 * (3 / 4) * (2 / 6)
    assert papers_flops_drop(ChannelGraph(dense, IMAGE), small) == pytest.approx(100 * (1 - after / before))


def test_papers_flops_drop_is_the_published_one():
    """SFP and FPGM state 52.6 % for ResNet-56 with 40 % of all filters pruned; exactly 0.6, which no real network can have."""
    dense = CifarResNet(depth=56, num_classes=10).eval()
    small = copy.deepcopy(dense)
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            module.out_channels *= 0.6
    assert papers_flops_drop(ChannelGraph(dense, torch.randn(1, 3, 32, 32)), small) == pytest.approx(52.6, abs=0.1)


def test_a_layer_that_is_gone_costs_nothing():
    dense, small = chain(4, 6), chain(4, 6)
    small[3] = nn.Identity()
    left = nn.Module()
    left.add_module("0", small[0])
    before = 64 * 3 * 4 * 9 + 16 * 4 * 6 * 9
    assert papers_flops_drop(ChannelGraph(dense, IMAGE), left) == pytest.approx(100 * (1 - 64 * 3 * 4 * 9 / before))
