"""Networks of torchvision that the code has never seen come out smaller, and the same function."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks.compaction_zoo import build
from prune.compact import compact

# The most parameters that may be left where 40 % of all channels are dead; some have operations that need all channels.
PARAMETERS_LEFT = {
    "vgg16_bn": 0.4,
    "mobilenet_v2": 0.45,
    "densenet121": 0.55,
    "squeezenet1_1": 0.4,
    "googlenet": 0.4,
    "resnext50_32x4d": 0.5,
    "shufflenet_v2_x0_5": 0.4,
    "regnet_y_400mf": 0.5,
    "efficientnet_b0": 0.45,
    "convnext_tiny": 0.5,
}


DEAD_SHARE = 0.4


@torch.no_grad()
def clear_channels(network):
    """Zeros in a part of every layer but the last, and in the batch norm that follows it where they are registered in order."""
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    for layer, follower in pairwise(layers):
        if isinstance(layer, nn.BatchNorm2d):
            continue
        dead = torch.rand(len(layer.weight)) < DEAD_SHARE
        follows = isinstance(follower, nn.BatchNorm2d) and len(follower.weight) == len(dead)
        for cleared in (layer, follower) if follows else (layer,):
            cleared.weight[dead] = 0
            if cleared.bias is not None:
                cleared.bias[dead] = 0


@pytest.mark.parametrize("name", PARAMETERS_LEFT)
def test_smaller_and_equal(name):
    network, images = build(f"torchvision/{name}", sides=(32, 64))
    clear_channels(network)
    small = compact(network, images, tolerance=1e-5)
    left, all_of_them = (sum(parameter.numel() for parameter in net.parameters()) for net in (small, network))
    assert left < PARAMETERS_LEFT[name] * all_of_them
    with torch.no_grad():
        expected, found = network(images), small(images)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
