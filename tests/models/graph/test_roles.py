"""Which layers give a network's results: their channels are never pruned."""

import pytest
import torch
import torch.nn.functional as F
from selections import hard_pruning, prunable_layers
from torch import Tensor, nn

from models.graph import ChannelGraph
from prune.compact import compact
from prune.masks import choose_filters, keep_ratios


class MeanShift(nn.Conv2d):
    """Adds a mean to each colour: a fixed 1x1 convolution, as EDSR and RCAN have it behind their last layer."""

    def __init__(self, sign: int, *, learns: bool = False):
        super().__init__(3, 3, 1)
        self.weight.data, self.bias.data = torch.eye(3).view(3, 3, 1, 1), sign * torch.tensor([0.4, 0.45, 0.5])
        self.requires_grad_(learns)


class SuperResolution(nn.Module):
    def __init__(self, **last):
        super().__init__()
        self.sub, self.add = MeanShift(-1), MeanShift(1, **last)
        self.head, self.body, self.tail = (nn.Conv2d(*sizes, 3, padding=1) for sizes in ((3, 8), (8, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.sub(x))
        return self.add(self.tail(x + self.body(x.relu())))


class Padded(nn.Conv2d):
    """A convolution with a forward pass of its own, as in ports of EfficientNet from TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def convolutional_head(kind: type[nn.Conv2d]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), kind(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def pruned(network: nn.Module, *, keep: float) -> nn.Module:
    layers = prunable_layers(network)
    hard_pruning(network, choose_filters(layers, keep_ratios(layers, [keep]), criterion="filter-a"))
    return network.eval()


def test_the_last_learned_layer_is_found_behind_a_fixed_one():
    assert ChannelGraph(SuperResolution()).classifying_layers == {"tail", "add"}
    assert ChannelGraph(SuperResolution(learns=True)).classifying_layers == {"add"}


def test_a_fixed_classifier_is_where_the_search_ends():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10).requires_grad_(False))
    assert ChannelGraph(network).classifying_layers == {"3"}


def test_a_wholly_frozen_network_is_as_when_it_learned():
    network = convolutional_head(nn.Conv2d)
    assert ChannelGraph(network.requires_grad_(False)).classifying_layers == {"3"}


def test_no_colour_of_an_image_is_lost():
    torch.manual_seed(0)
    network, images = pruned(SuperResolution(), keep=0.5), torch.rand(2, 3, 8, 8)
    small = compact(network, images)
    assert small.body.weight.shape[0] == 4
    assert (small(images).std((0, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("kind", [nn.Conv2d, Padded, Standardised])
def test_no_class_is_lost_to_a_convolution_with_a_forward_of_its_own(kind):
    torch.manual_seed(0)
    network = convolutional_head(kind)
    assert ChannelGraph(network).classifying_layers == {"3"}
    assert [layer.name for layer in prunable_layers(network)] == ["0"]
    logits = compact(pruned(network, keep=0.5), torch.randn(2, 3, 8, 8))(torch.randn(2, 3, 8, 8))
    assert (logits != 0).all()
