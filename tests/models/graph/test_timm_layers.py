"""Layers of timm that are subclasses of torch's: cut as what they are, or left whole."""

import pytest
import torch
from torch import nn

from prune.compact import compact

layers = pytest.importorskip("timm.layers")
DEAD = [1, 2, 5]  # of 8 filters


def compacted(network: nn.Module) -> nn.Module:
    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    small = compact(network.eval(), images, tolerance=1e-5)
    torch.testing.assert_close(small(images), network(images), rtol=1e-4, atol=1e-5)
    return small


def clear(layer: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor[DEAD] = 0


@pytest.mark.parametrize("name", ["Conv2dSame", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_filters_of_convolutions_go(name):
    network = nn.Sequential(getattr(layers, name)(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    clear(network[0])
    small = compacted(network)
    assert small.state_dict()["0.weight"].shape[0] == 5 and small.state_dict()["2.weight"].shape[1] == 5


def test_a_standardised_convolution_keeps_its_inputs():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), layers.StdConv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    clear(network[0])
    clear(network[2])
    state = compacted(network).state_dict()
    assert [tuple(state[f"{index}.weight"].shape[:2]) for index in (0, 2, 3)] == [(5, 3), (5, 8), (4, 5)]


@pytest.mark.parametrize(("activation", "entries"), [(nn.ReLU, 5), (nn.SiLU, 5), (nn.Sigmoid, 8)])
def test_a_batch_norm_with_an_activation(activation, entries):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), layers.BatchNormAct2d(8, act_layer=activation), nn.Conv2d(8, 4, 1))
    network[1].running_mean.normal_()
    clear(network[0])
    clear(network[1])
    assert len(compacted(network).state_dict()["1.weight"]) == entries


def test_in_training_too():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), layers.BatchNormAct2d(8), layers.DropPath(0.0), nn.Conv2d(8, 4, 1))
    clear(network[0])
    clear(network[1])
    small, images = compacted(network).train(), torch.randn(4, 3, 9, 9)
    torch.testing.assert_close(small(images), network.train()(images), rtol=1e-4, atol=1e-5)
