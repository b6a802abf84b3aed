"""Least squares, layer by layer: against a solver of NumPy's, and what must hold whatever the network."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from selections import hard_pruning, narrow
from torch import Tensor, nn

from models import build_model
from prune.reconstruction import reconstruct
from tests.support.random_networks import RandomNetwork, network_descriptions, prune_at_random
from utils.errors import UserError


class Pair(nn.Module):
    """A convolution and one that reads it, each with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def images(*shape: int, count: int = 2, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def pair() -> Pair:
    torch.manual_seed(1)
    return Pair().eval()


def without(network: nn.Module, kept: dict[str, list[int]]) -> nn.Module:
    """The network with zeros in the place of all other filters."""
    masked = copy.deepcopy(network)
    for name, channels in kept.items():
        layer = masked.get_submodule(name)
        gone = sorted({*range(len(layer.weight))} - {*channels})
        layer.weight.data[gone], layer.bias.data[gone] = 0, 0
    return masked


def test_the_weights_are_those_of_a_solver_of_the_augmented_system(pair):
    batches = images(5, 3, 6, 6)
    small = narrow(pair, {"first": [0, 2, 3]})
    start = small.get_submodule("second").weight.detach().double().reshape(4, -1)
    reconstruct(small, pair, batches)
    with torch.no_grad():
        x = torch.cat([pair.first(batch).relu()[:, [0, 2, 3]] for batch in batches])
        y = torch.cat([pair(batch) for batch in batches])
    rows = F.unfold(x, 3, padding=1).mT.reshape(-1, 27).double().numpy()
    ridge = 1e-3 * np.square(rows).sum(0).mean()
    system = np.block([[rows, np.ones((len(rows), 1))], [np.sqrt(ridge) * np.eye(27), np.zeros((27, 1))]])
    wanted = np.concatenate([y.movedim(1, -1).reshape(-1, 4).double().numpy(), np.sqrt(ridge) * start.numpy().T])
    expected = np.linalg.lstsq(system, wanted, rcond=None)[0]
    second = small.get_submodule("second")
    np.testing.assert_allclose(second.weight.detach().reshape(4, -1).numpy().T, expected[:-1], atol=1e-5)
    np.testing.assert_allclose(second.bias.detach().numpy(), expected[-1], atol=1e-5)


def test_a_channel_that_was_a_copy_of_another_is_not_missed(pair):
    with torch.no_grad():
        pair.first.weight[5], pair.first.bias[5] = pair.first.weight[0], pair.first.bias[0]
    small, batches = narrow(pair, {"first": [0, 1, 2, 3, 4]}), images(16, 3, 8, 8)
    fit = reconstruct(small, pair, batches, ridge=1e-9)[1]
    assert fit.before > 0.01 and fit.after < 1e-9
    torch.testing.assert_close(small(batches[0]), pair(batches[0]), atol=1e-4, rtol=1e-4)


def test_what_reads_nothing_changed_keeps_its_bits(pair):
    small = narrow(pair, {"second": [1, 2]})
    fits = reconstruct(small, pair, images(4, 3, 6, 6))
    assert [fit.left for fit in fits] == [0, 0]
    assert torch.equal(small.get_submodule("first").weight, pair.first.weight)
    assert torch.equal(small.get_submodule("second").weight, pair.second.weight[[1, 2]])


def resnet(kept_share: float) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    network = build_model("resnet20", num_classes=5).eval()
    convs = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    widths = {name: len(network.get_submodule(name).weight) for name in convs}
    return network, {name: torch.arange(int(width * kept_share)) for name, width in widths.items()}


def test_the_masked_network_becomes_what_the_small_one_does():
    network, kept = resnet(0.5)
    masked = copy.deepcopy(network)
    small, batches = hard_pruning(masked, kept).selection.shrink(), images(4, 3, 12, 12)
    fits, others = reconstruct(small, network, batches), reconstruct(masked, network, batches)
    dense = small.dense_state_dict()
    for fit, other in zip(fits, others, strict=True):
        key = f"{fit.name}.weight"
        torch.testing.assert_close(
            small.narrowed(key, masked.state_dict()[key]), small.narrowed(key, dense[key]), atol=1e-4, rtol=1e-3
        )
        assert (fit.filters, fit.positions) == (other.filters, other.positions)
        assert other.after == pytest.approx(fit.after, rel=1e-3, abs=1e-9)


def test_pruned_filters_stay_at_zero():
    network, kept = resnet(0.5)
    masked = copy.deepcopy(network)
    schedule = hard_pruning(masked, kept)
    reconstruct(masked, network, images(4, 3, 12, 12))
    before = copy.deepcopy(masked.state_dict())
    schedule.clear_pruned()
    assert all(torch.equal(before[key], value) for key, value in masked.state_dict().items())


def test_the_same_images_give_the_same_bits():
    network, kept = resnet(0.6)
    states = []
    for _ in range(2):
        small = narrow(network, {name: channels.tolist() for name, channels in kept.items()})
        reconstruct(small, network, images(3, 3, 12, 12))
        states.append(small.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@given(network_descriptions(), st.integers(2, 5), st.integers(0, 99))
def test_no_layer_of_any_network_gets_a_larger_error(operations, hidden, seed):
    torch.manual_seed(seed)
    network = RandomNetwork(operations, hidden=hidden).eval()
    masked = copy.deepcopy(network)
    prune_at_random(masked, seed=seed, dead_share=0.4)
    try:
        fits = reconstruct(masked, network, images(3, 3, 6, 6))
    except UserError as error:  # an operation in place that the graph does not say, or a product that overflows
        assert "torch.fx" in str(error) or "NaN" in str(error) or "RandomNetwork" in str(error)
        return
    assert all(fit.after <= fit.before for fit in fits)
    for layer, other in zip(masked.modules(), network.modules(), strict=True):
        if isinstance(layer, nn.BatchNorm2d) and layer.affine:
            assert torch.equal(layer.running_mean, other.running_mean)  # statistics are not its concern


class Mixed(nn.Module):
    """Grouped, depthwise, dilated and transposed convolutions, a sequence and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.line = nn.Conv1d(6, 6, 3)
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.grouped(self.stem(x).relu())).relu()
        x = self.line(self.up(self.depthwise(x).relu()).relu().flatten(2)).mean(2)
        return self.head(self.hidden(x).relu())


def test_every_kind_of_layer_is_mended():
    torch.manual_seed(3)
    network = Mixed().eval()
    kept = {
        "stem": [0, 1, 2, 4, 5, 6],
        "grouped": [0, 1, 4, 5],
        "norm": [0, 1, 4, 5],
        "depthwise": [0, 1, 4, 5],
        "hidden": [*range(6)],
    }
    small, batches = narrow(network, kept), images(8, 3, 8, 8)
    before = (small(batches[0]) - network(batches[0])).square().mean()
    fits = reconstruct(small, network, batches)
    assert [fit.name for fit in fits] == ["stem", "grouped", "depthwise", "up", "line", "hidden", "head"]
    assert all(fit.after < fit.before for fit in fits[1:])
    assert (small(batches[0]) - network(batches[0])).square().mean() < before


def test_a_network_of_several_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.head = nn.Linear(4, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head((self.left(a) + self.right(b)).relu().mean((2, 3)))

    torch.manual_seed(0)
    network = Two().eval()
    masked = without(network, {"left": [0, 1], "right": [0, 1]})
    a, b = images(6, 3, 4, 4)
    by_place = copy.deepcopy(masked)
    assert reconstruct(by_place, network, [(a, b)])[-1].after < 1
    by_name = copy.deepcopy(masked)
    reconstruct(by_name, network, [{"b": b, "a": a}])
    assert all(torch.equal(by_place.state_dict()[key], value) for key, value in by_name.state_dict().items())


def test_too_few_images_are_carried_by_the_ridge(pair):
    small = narrow(pair, {"first": [0, 1, 2]})
    fits = reconstruct(small, pair, images(1, 3, 2, 2, count=1))
    assert fits[1].is_scarce and fits[1].after <= fits[1].before
    assert all(value.isfinite().all() for value in small.state_dict().values())


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([], "not one image"),
        ([torch.empty(0, 3, 6, 6)], "not one image"),
        ([torch.ones(4, 3, 6, 6), torch.ones(2, 3, 6, 6)], "6 images are all equal"),
        ([torch.randn(4, 3, 6, 6).fill_(float("nan"))], "first: what it reads or gives is NaN"),
    ],
)
def test_images_that_say_nothing_are_refused(pair, batches, reason):
    small = narrow(pair, {"first": [0, 1, 2]})
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(UserError, match=reason):
        reconstruct(small, pair, batches)
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())


def test_networks_that_do_not_belong_together_are_refused(pair):
    with pytest.raises(UserError, match="no convolution or linear layer of one name"):
        reconstruct(nn.Sequential(nn.Conv2d(3, 4, 1)), pair, images(4, 3, 6, 6))
    other = copy.deepcopy(pair)
    other.second = nn.Conv2d(6, 5, 3)
    with pytest.raises(UserError, match=r"second\.weight"):
        reconstruct(other, pair, images(4, 3, 6, 6))
