"""The batch norm for uneven numbers of channels computes what nn.BatchNorm2d computes."""

import copy

import pytest
import torch
from selections import hard_pruning, prunable_layers
from torch import nn

from models import batch_norm
from models.batch_norm import UnevenBatchNorm2d, quicken_batch_norms
from models.cifar_resnet import CifarResNet
from prune.compact import compact


def images(*shape, dtype=torch.float64, seed=0):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (3 * noise + 2).contiguous(memory_format=torch.channels_last)


def pair(channels, *, dtype=torch.float64):
    """Both kinds, with the same weights that are neither one nor zero."""
    torch.manual_seed(1)
    plain = nn.BatchNorm2d(channels, momentum=0.3).to(dtype)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    network = nn.Sequential(copy.deepcopy(plain))
    quicken_batch_norms(network)
    return plain, network[0]


@pytest.fixture
def taken(monkeypatch):
    """How often the fast way was taken."""
    calls, ordinary = [], batch_norm._WideBatchNorm.apply
    monkeypatch.setattr(batch_norm._WideBatchNorm, "apply", lambda *args: calls.append(args) or ordinary(*args))
    return calls


@pytest.mark.parametrize("channels", [1, 8, 10, 19, 38])
def test_output_gradients_and_statistics_are_those_of_torch(taken, channels):
    plain, quick = pair(channels)
    inputs = [images(4, channels, 8, 8).requires_grad_() for _ in range(2)]
    weights = images(4, channels, 8, 8, seed=2)
    for norm, x in zip((plain, quick), inputs, strict=True):
        for _ in range(2):
            (norm(x) * weights).sum().backward()
    assert len(taken) == 2
    torch.testing.assert_close(quick(inputs[1]), plain(inputs[0]))
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(quick.weight.grad, plain.weight.grad)
    torch.testing.assert_close(quick.bias.grad, plain.bias.grad)
    torch.testing.assert_close(quick.state_dict(), plain.state_dict())


def test_gradient_against_finite_differences(taken):
    _, quick = pair(3)
    torch.autograd.gradcheck(quick, images(2, 3, 4, 4).requires_grad_(), fast_mode=True)
    assert taken


def test_a_large_mean_costs_no_precision(taken):
    plain, quick = pair(10, dtype=torch.float32)
    plain = plain.double()
    exact = (images(4, 10, 8, 8) + 1000).float().double().requires_grad_()
    x = exact.detach().float().requires_grad_()
    weights = images(4, 10, 8, 8, seed=2)
    outputs = quick(x), plain(exact)
    (outputs[0] * weights.float()).sum().backward()
    (outputs[1] * weights).sum().backward()
    assert len(taken) == 1
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(quick.running_var.double(), plain.running_var, rtol=1e-3, atol=0)


def test_what_follows_may_write_into_its_output(taken):
    plain, quick = pair(10)
    x = images(4, 10, 8, 8).requires_grad_()
    torch.testing.assert_close(nn.functional.relu(quick(x), inplace=True), nn.functional.relu(plain(x)))
    assert taken


def test_networks_with_it_are_traced_and_cut_as_with_any_batch_norm():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 4, 3), nn.BatchNorm2d(4))
    network.append(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    quicken_batch_norms(network)
    assert [layer.norm_name for layer in prunable_layers(network)] == ["1", "4"]
    hard_pruning(network, {"0": torch.arange(6)})
    small = compact(network, torch.randn(2, 3, 8, 8))
    assert small.get_submodule("0").out_channels == small.get_submodule("1").num_features == 6


@pytest.mark.parametrize("case", ["evaluation", "contiguous", "odd pixels"])
def test_everywhere_else_it_is_torch_itself(taken, case):
    plain, quick = pair(10, dtype=torch.float32)
    x = images(2, 10, 8, 8, dtype=torch.float32)
    if case == "evaluation":
        plain.eval(), quick.eval()
    odd = images(1, 10, 3, 3, dtype=torch.float32)
    x = {"contiguous": x.contiguous(), "odd pixels": odd}.get(case, x)
    torch.testing.assert_close(quick(x), plain(x), rtol=0, atol=0)
    assert not taken


def test_images_in_bfloat16_are_normalised_in_float32(taken):
    plain, quick = pair(10, dtype=torch.float32)
    inputs = [images(4, 10, 8, 8).bfloat16().requires_grad_() for _ in range(2)]
    weights = images(4, 10, 8, 8, seed=2).bfloat16()
    outputs = [norm(x) for norm, x in zip((plain, quick), inputs, strict=True)]
    for output in outputs:
        (output * weights).sum().backward()
    assert len(taken) == 1 and outputs[1].dtype == inputs[1].grad.dtype == torch.bfloat16
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(quick.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(quick.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-4)


def test_only_uneven_ones_change_and_stay_the_same_modules():
    network = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.BatchNorm2d(16), nn.BatchNorm2d(7, affine=False)).eval()
    modules, weight, state = list(network), network[1].weight, copy.deepcopy(network.state_dict())
    quicken_batch_norms(network)
    assert [type(module) for module in network[1:]] == [UnevenBatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d]
    assert list(network) == modules and network[1].weight is weight and not network[1].training
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)


def test_a_network_of_even_widths_is_left_alone():
    network = CifarResNet(depth=8, num_classes=3)
    quicken_batch_norms(network)
    assert not any(isinstance(module, UnevenBatchNorm2d) for module in network.modules())
