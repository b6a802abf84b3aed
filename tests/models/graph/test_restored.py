"""Which channels a small network puts back, and for which operation; parameters by channel need none."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from selections import narrow
from torch import nn

from models.graph import Restored

KEPT = [0, 2, 3]


class Scaled(nn.Module):
    """conv - times a parameter - conv - mean - linear."""

    def __init__(self, *shape, view=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1), nn.Linear(4, 2)
        self.gamma, self.view = nn.Parameter(torch.randn(shape)), view

    def forward(self, x):
        gamma = self.gamma if self.view is None else self.gamma.view(self.view)
        return self.head(self.second(self.first(x) * gamma).mean((2, 3)))


def masked(network, kept=KEPT):
    with torch.no_grad():
        for tensor in (network.first.weight, network.first.bias):
            tensor[[channel for channel in range(5) if channel not in kept]] = 0
    return network.eval()


@pytest.mark.parametrize(
    "network", [Scaled(5, 1, 1), Scaled(1, 5, 1, 1), Scaled(5, 4, 4), Scaled(5, view=(1, -1, 1, 1)), Scaled(5, view=(5, 1, 1))]
)
def test_a_parameter_by_channel_scales_what_is_left(network):
    network, images = masked(network), torch.randn(2, 3, 4, 4)
    small = narrow(network, {"first": KEPT})
    assert small.restored == [] and small.get_submodule("second").in_channels == 3
    torch.testing.assert_close(small(images), network(images))
    small(images).sum().backward()
    network(images).sum().backward()
    gamma = network.gamma.grad.flatten()
    torch.testing.assert_close(small.state_dict(keep_vars=True)["gamma"].grad.flatten()[KEPT], gamma[KEPT])


@pytest.mark.parametrize("network", [Scaled(), Scaled(1), Scaled(4, 4)])
def test_a_parameter_that_all_channels_share_stays_as_it_is(network):
    network, images = masked(network), torch.randn(2, 3, 4, 4)
    small = narrow(network, {"first": KEPT})
    assert small.restored == [] and small.get_submodule("second").in_channels == 3
    torch.testing.assert_close(small(images), network(images))


def test_operations_are_named_with_their_place():
    class Normed(Scaled):
        def forward(self, x):
            x = F.layer_norm(self.first(x).mean((2, 3)), (5,))
            return x

    small = narrow(masked(Normed(5)), {"first": KEPT})
    [restored] = small.restored
    assert restored.layers == ("first",) and restored.operation.startswith("layer_norm (")
    assert Path(__file__).name in restored.operation


def test_the_result_of_the_network_has_all_channels():
    network = masked(Scaled(5))
    network = nn.Sequential(network.first)
    assert narrow(network, {"0": KEPT}).restored == [Restored(("0",), "the network's result")]
