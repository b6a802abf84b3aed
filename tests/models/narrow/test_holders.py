"""Whatever holds the weights of a network, the small one has them: it saves, loads, trains and gives them back."""

import io

import pytest
import torch
from selections import narrow
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from prune.compact import compact

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIZE = (8, 1, 1)


class Holder(nn.Module):
    """A convolution with a dead filter, then whatever `between` does, then a classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
        with torch.no_grad():
            self.first.weight[2], self.first.bias[2] = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.first(x)).mean((2, 3)))


class Scripted(Holder):
    def __init__(self):
        super().__init__()
        self.between = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))


class ListsAndDicts(Holder):
    def __init__(self):
        super().__init__()
        self.several = nn.ParameterList([torch.rand(SIZE), torch.rand(SIZE)])
        self.named = nn.ParameterDict({"scale": torch.rand(SIZE)})
        self.layers = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 1)})

    def between(self, x: Tensor) -> Tensor:
        for parameter in self.several:
            x = x * parameter
        return self.layers["conv"](x) * self.named["scale"]


class Buffers(Holder):
    def __init__(self):
        super().__init__()
        self.register_buffer("saved", torch.rand(SIZE))
        self.register_buffer("unsaved", torch.full(SIZE, 2.0), persistent=False)
        self.plain, self.listed = torch.full(SIZE, 3.0), [torch.full(SIZE, 0.5)]

    def between(self, x: Tensor) -> Tensor:
        return x * self.saved * self.unsaved + self.plain * self.listed[0]


class Tied(Holder):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.two.weight = self.one.weight

    def between(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


class Parametrized(Holder):
    def __init__(self):
        super().__init__()
        self.between = parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.head = parametrizations.orthogonal(self.head)


class Bare(Holder):
    """Weights that are parameters of the network itself, read by functions."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Parameter(torch.randn(8))

    def between(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias)


HOLDERS = (Scripted, ListsAndDicts, Buffers, Tied, Parametrized, Bare)


def new(kind: type[Holder], seed: int) -> Holder:
    torch.manual_seed(seed)
    return kind()


@pytest.mark.parametrize("kind", HOLDERS)
def test_the_small_network_saves_and_loads_all_that_it_runs_on(kind):
    network = new(kind, 0).eval()
    small = compact(network, IMAGES)
    assert small.first.weight.shape[0] == 7 or kind in (Bare, Scripted)
    assert small.state_dict().keys() == network.state_dict().keys()
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    other = narrow(new(kind, 1).eval(), small.kept, example=IMAGES)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(IMAGES), network(IMAGES))
    dense = new(kind, 2).eval()
    dense.load_state_dict(small.dense_state_dict())
    torch.testing.assert_close(dense(IMAGES), network(IMAGES))


@pytest.mark.parametrize("kind", HOLDERS)
def test_the_small_network_trains_every_parameter(kind):
    network = new(kind, 0).train()
    small = narrow(network, {}, example=IMAGES)
    gradients = []
    for each in (network, small):
        each(IMAGES).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
    assert all(gradient is not None for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[1], gradients[0])
    assert not {id(own) for own in network.parameters()} & {id(own) for own in small.parameters()}
