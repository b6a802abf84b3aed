"""The squares of what goes with a filter, against sums that are written out."""

import pytest
import torch
from torch import nn

from models.graph import ChannelGraph
from models.graph.groups import single_groups
from models.graph.squares import GroupSquares, squares_of_filters


class Residual(nn.Module):
    """A stem and a block whose results are added, a depthwise convolution, and a linear layer that reads flat maps."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner, self.inner_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.wide, self.deep = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.classifier = nn.Linear(6 * 4, 3)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        x = x + self.inner_norm(self.inner(x))
        return self.classifier(self.deep(self.wide(x)).relu().flatten(1))


@pytest.fixture
def network() -> Residual:
    torch.manual_seed(0)
    network = Residual()
    nn.init.normal_(network.stem_norm.weight)
    return network


def squares(weight: torch.Tensor, *axes: int) -> torch.Tensor:
    return weight.detach().square().sum(axes) if axes else weight.detach().square()


def hidden_squares(network: Residual) -> torch.Tensor:
    """Of the filters of `wide`, those of `deep` that go with them, and the pixels that the classifier reads."""
    flat = network.classifier.weight.view(3, 6, 4)
    return squares(network.wide.weight, 1, 2, 3) + squares(network.deep.weight, 1, 2, 3) + squares(flat, 0, 2)


def test_coupled_filters_have_the_squares_of_all_that_goes_with_them(network):
    graph = ChannelGraph(network, torch.zeros(2, 3, 2, 2))
    layers = graph.prunable_layers()
    found = squares_of_filters(graph, graph.channel_groups(layers), layers)
    stream = squares(network.stem.weight, 1, 2, 3) + squares(network.inner.weight, 1, 2, 3)
    stream += squares(network.stem_norm.weight) + squares(network.inner_norm.weight)
    stream += squares(network.inner.weight, 0, 2, 3) + squares(network.wide.weight, 0, 2, 3)
    hidden = hidden_squares(network)
    for name, expected in {"stem": stream, "inner": stream, "wide": hidden, "deep": hidden}.items():
        torch.testing.assert_close(found[name].float(), expected)


def test_without_coupling_only_columns_count_that_one_filter_alone_fills(network):
    graph = ChannelGraph(network, torch.zeros(2, 3, 2, 2))
    layers = graph.prunable_layers()
    found = squares_of_filters(graph, single_groups(layers), layers)
    expected = squares(network.stem.weight, 1, 2, 3) + squares(network.stem_norm.weight)
    torch.testing.assert_close(found["stem"].float(), expected)  # its channels meet those of another in the sum
    torch.testing.assert_close(found["wide"].float(), hidden_squares(network))


def test_the_gradient_of_the_sums_is_twice_the_weights(network):
    graph = ChannelGraph(network, torch.zeros(2, 3, 2, 2))
    layers = graph.prunable_layers()
    GroupSquares(graph, graph.channel_groups(layers), layers)(network).sum().backward()
    torch.testing.assert_close(network.inner.weight.grad, 4 * network.inner.weight.detach())  # as filters and as columns
    torch.testing.assert_close(network.stem.weight.grad, 2 * network.stem.weight.detach())
    assert network.stem.bias.grad is None
