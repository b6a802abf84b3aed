"""Overwriting in evaluation: it happens, and nothing that is read later, shown by a view or held by a caller changes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from selections import narrow
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.cifar_resnet import CifarResNet

CHANNELS = 4


class Counts(TorchDispatchMode):
    """How often each operation ran within it."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


class Small(nn.Module):
    """Two convolutions and whatever `wiring(network, images)` does with them."""

    def __init__(self, wiring: Callable[["Small", Tensor], Tensor]):
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.activation = nn.ReLU()
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def images(channels: int = CHANNELS, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def halved_resnet() -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet(depth=14, num_classes=5).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.bias)
    even = {
        name: list(range(0, layer.weight.shape[0], 2))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d) and "stage" in name
    }
    return narrow(model, even)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_feature_maps_are_what_they_are_with_gradients(layout):
    small = halved_resnet().to(memory_format=layout)
    batch = images(3).to(memory_format=layout)
    expected = small.outputs(batch)
    with torch.no_grad():
        found = small.outputs(batch)
        torch.testing.assert_close(small(batch), expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_sums_and_activations_of_a_resnet_fetch_no_memory():
    small = halved_resnet()
    with torch.no_grad(), Counts() as evaluation:
        small(images(3))
    with Counts() as recording:
        small(images(3))
    # four of the six blocks: the shortcuts of the others make a wider map, which is theirs to add into
    assert (recording.counts["relu"], recording.counts["index_add"]) == (13, 4)
    assert evaluation.counts["relu_"] == 13
    assert not {"relu", "index_add"} & evaluation.counts.keys()


@pytest.mark.parametrize(
    ("wiring", "expected"),
    [
        (lambda net, x: net.activation(net.first(x)), {"relu_": 1}),
        (lambda net, x: net.first(x).relu(), {"relu_": 1}),
        (lambda net, x: torch.relu(net.first(x)) + net.second(x), {"relu_": 1, "add_": 1}),
        (lambda net, x: net.first(x) + F.relu(x), {"add_": 1, "relu": 1}),  # the images are the caller's
        (lambda net, x: x + x, {"add": 1}),
    ],
)
def test_what_is_overwritten(wiring, expected):
    network, batch = Small(wiring).eval(), images()
    small, before = narrow(network, {}), batch.clone()
    with torch.no_grad(), Counts() as evaluation:
        found = small(batch)
    torch.testing.assert_close(found, network(batch))
    assert torch.equal(batch, before)
    names = ("relu", "relu_", "add", "add_")
    assert {name: count for name, count in evaluation.counts.items() if name in names} == expected


@pytest.mark.parametrize(
    "wiring",
    [
        lambda net, x: [y := net.first(x), F.relu(y) + y][1],  # read once more by the sum
        lambda net, x: [y := net.first(x), F.relu(y) + net.second(y)][1],
        lambda net, x: [y := net.first(x), part := y[:, :, ::2], F.relu(y)[:, :, ::2] - part][2],  # shown by a view
        lambda net, x: [y := net.first(x), flat := y.flatten(1), F.relu(y).flatten(1) - flat][2],
        lambda net, x: [y := net.first(x), y + y][1],
        lambda net, x: [y := net.first(x), y + y.mean((2, 3), keepdim=True)][1],  # a sum that broadcasts
        lambda net, x: [y := net.first(x), y.mean((2, 3), keepdim=True) + y][1],
    ],
)
def test_what_is_read_later_stays(wiring):
    network = Small(wiring).eval()
    small = narrow(network, {"first": [0, 2]})
    with torch.no_grad():
        network.first.weight[[1, 3]] = network.first.bias[[1, 3]] = 0
        torch.testing.assert_close(small(images()), network(images()))


def test_a_sum_of_two_types_is_promoted():
    network = Small(lambda net, x: net.first(x) + net.second(x)).eval()
    small = narrow(network, {})
    network.second.double(), small.second.double()
    network.second.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    small.second.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    with torch.no_grad():
        assert small(images()).dtype == torch.float64
        torch.testing.assert_close(small(images()), network(images()))
