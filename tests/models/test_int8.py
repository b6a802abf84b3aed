"""Simulated eight bits: values worked out by hand, whole numbers in NumPy, gradients that pass, and bounds that travel."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int8_networks import simulated, small_resnet
from selections import narrow
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.int8 import Bounds, Int8Network
from utils.errors import UserError


def test_activations_are_rounded_to_256_values_between_their_bounds():
    bounds = Bounds()
    bounds.low.fill_(-1.0)
    bounds.high.fill_(1.55)  # steps of 0.01, of which the hundredth is 0
    x = torch.tensor([-2.0, -1.0, -0.123, 0.0, 0.506, 1.55, 9.0])
    expected = torch.tensor([-1.0, -1.0, -0.12, 0.0, 0.51, 1.55, 1.55])
    scale, zero = bounds.scale_and_zero()
    assert (float(scale), int(zero)) == (pytest.approx(0.01), 100)
    torch.testing.assert_close(bounds.eval()(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(bounds(x), expected)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.floats(-50, 0, width=32), st.floats(0, 50, width=32))
def test_zero_stays_zero_and_nothing_moves_by_more_than_half_a_step(values, low, high):
    bounds = Bounds().eval()
    bounds.low.fill_(low)
    bounds.high.fill_(high)
    step = float(bounds.scale_and_zero()[0])
    x = torch.tensor([0.0, *values])
    rounded = bounds(x)
    assert rounded[0] == 0
    inside = (x >= low + step) & (x <= high - step)
    assert ((rounded - x).abs()[inside] <= step * 0.5001 + 1e-6).all()
    assert rounded.min() >= low - step - 1e-5 and rounded.max() <= high + step + 1e-5


def test_bounds_begin_with_the_first_batch_and_follow_the_others_slowly():
    bounds = Bounds().train()
    bounds(torch.tensor([-1.0, 3.0]))
    assert (float(bounds.low), float(bounds.high)) == (-1.0, 3.0)
    bounds(torch.tensor([-2.0, 4.0]))
    assert (float(bounds.low), float(bounds.high)) == (pytest.approx(-1.01), pytest.approx(3.01))
    bounds.eval()(torch.tensor([-9.0, 9.0]))
    assert float(bounds.high) == pytest.approx(3.01)


def test_gradients_pass_the_rounding_but_not_the_bounds():
    bounds = Bounds().eval()
    bounds.low.fill_(-1.0)
    bounds.high.fill_(1.0)
    x = torch.tensor([-3.0, -0.4, 0.7, 2.0], requires_grad=True)
    (bounds(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0]


def test_batch_norms_are_folded_as_torch_folds_them():
    network = small_resnet()
    plain, names = Int8Network(network).plain()
    conv, norm = network.get_submodule("stage_1.0.conv_a"), network.get_submodule("stage_1.0.bn_a")
    fused, own = fuse_conv_bn_eval(conv, norm), plain.get_submodule("simulated_.stage_1_0_conv_a")
    torch.testing.assert_close(own.weight, fused.weight)
    torch.testing.assert_close(own.bias, fused.bias)
    images = torch.randn(4, 3, 32, 32)
    logits, *rounded = plain(images)
    torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-4)
    assert len(rounded) == len(names) and "x" not in names


def integers_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(weight).reshape(len(weight), -1).max(1) / np.float32(127)
    return np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int64), scale


def test_a_convolution_is_that_of_whole_numbers():
    """An independent one: int64 in NumPy, window by window."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    torch.manual_seed(2)
    own = simulated(narrow(Net(), {}), torch.randn(8, 3, 6, 6))
    images = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        found = own(images).numpy()
    (given,) = own.bounds  # what is read; the result is the network's own
    scale, zero = (value.numpy() for value in given.scale_and_zero())
    numbers = np.clip(np.rint(images.numpy() / scale) + zero, 0, 255).astype(np.int64) - zero
    conv = own.network.get_submodule("conv")
    weight, steps = integers_of(conv.weight.detach().numpy())
    padded = np.pad(numbers, ((0, 0), (0, 0), (1, 1), (1, 1)))
    sums = np.zeros((2, 5, 6, 6), np.int64)
    for row in range(6):
        for column in range(6):
            window = padded[:, None, :, row : row + 3, column : column + 3]
            sums[:, :, row, column] = (window * weight[None]).sum((2, 3, 4))
    bias = np.rint(conv.bias.detach().numpy() / (steps * scale)).astype(np.int64)
    expected = (sums + bias[:, None, None]) * (steps * scale)[:, None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "kept",
    [{}, {"stage_1__0__conv_b": [0, 3, 5], "stage_1__0__bn_b": [0, 3, 5], "conv_1_3x3": [1, 2, 5, 9], "bn_1": [1, 2, 5, 9]}],
)
def test_it_computes_nearly_what_the_network_does_and_the_same_in_both_methods(kept):
    network, images = small_resnet(**kept), torch.randn(16, 3, 32, 32)
    own = simulated(network, images)
    with torch.no_grad():
        logits, outputs, expected = own(images), own.outputs(images), network(images)
    assert torch.equal(logits, outputs.logits)
    assert len(outputs.blocks) == 3 and outputs.blocks[0].shape == (16, 16, 32, 32)
    difference = float((logits - expected).abs().max() / expected.abs().max())
    assert 1e-5 < difference < 0.1
    torch.testing.assert_close(own(images), logits, rtol=1e-2, atol=0.05 * float(expected.abs().max()))  # as in training


def test_training_changes_the_network_itself_and_not_its_statistics():
    network, images = small_resnet(), torch.randn(8, 3, 32, 32)
    own = simulated(network, images).train()
    statistics = network.get_submodule("bn_1").running_mean.clone()
    own(images).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    assert torch.equal(network.get_submodule("bn_1").running_mean, statistics)
    assert {id(parameter) for parameter in own.parameters()} == {id(parameter) for parameter in network.parameters()}


def test_a_copy_is_independent():
    images = torch.randn(4, 3, 32, 32)
    own = simulated(small_resnet(), images)
    other = copy.deepcopy(own)
    with torch.no_grad():
        before = own(images)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert torch.equal(own(images), before) and not torch.equal(other(images), before)


def test_bounds_travel_by_name():
    images = torch.randn(4, 3, 32, 32)
    own = simulated(small_resnet(), images)
    other = Int8Network(small_resnet()).eval()
    other.load_ranges(own.ranges())
    with torch.no_grad():
        assert torch.equal(own(images), other(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ranges: ranges.pop("relu"), "those of another network or version: 'relu'"),
        (lambda ranges: ranges.update(odd=(0, 1)), "those of another network or version: 'odd'"),
        (lambda ranges: ranges.update(relu=(1.0, 0.0)), "goes from 1.0 to 0.0"),
        (lambda ranges: ranges.update(relu=(0.0, float("inf"))), "goes from 0.0 to inf"),
        (lambda ranges: ranges.update(relu=(0.0,)), "expected two numbers"),
        (lambda ranges: ranges.update(relu=None), "expected two numbers"),
    ],
)
def test_bounds_of_another_network_are_refused(change, message):
    own = simulated(small_resnet(), torch.randn(4, 3, 32, 32))
    ranges = own.ranges()
    change(ranges)
    with pytest.raises(UserError, match=message):
        own.load_ranges(ranges)


def test_a_network_without_a_layer_to_round_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x).mean((2, 3))

    with pytest.raises(UserError, match="nothing of it can be int8"):
        Int8Network(narrow(Net(), {}))


def test_names_that_would_become_one_are_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_b = nn.Conv2d(3, 3, 1)
            self.a = nn.Module()
            self.a.b = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.a.b(self.a_b(x)).mean((2, 3))

    with pytest.raises(UserError, match=r"differ in \. and _ alone"):
        Int8Network(narrow(Net(), {}))


def test_weights_too_small_for_a_scale_are_zero_in_training_as_well():
    images = torch.randn(4, 3, 8, 8)
    network = narrow(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval(), {}, example=images)
    with torch.no_grad():
        network.get_submodule("0").weight.mul_(1e-36)
    own = Int8Network(network).train()
    logits = own(images)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in own.parameters())
