"""Shared weights: clusters against scikit-learn's k-means and by hand, gradients against the paper's update."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn

import quantize.codebook
from models.cifar_resnet import CifarResNet
from quantize.codebook import bake_weights, find_codebook, layer_bits, share_weights


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def test_clusters_by_hand():
    codebook, index = find_codebook(np.array([5.25, 0, 1, 4.75, 1.5, 0], np.float32), 1)
    assert codebook.tolist() == [1.25, 5] and codebook.dtype == np.float32
    assert index.tolist() == [2, 0, 1, 2, 1, 0]


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_clusters_are_those_of_scikit_learn(bits, monkeypatch):
    monkeypatch.setattr(quantize.codebook, "TOLERANCE", 0)
    values = np.random.default_rng(bits).normal(size=4000).astype(np.float32)
    start = np.linspace(values.min(), values.max(), 2**bits)[:, None]
    reference = KMeans(2**bits, init=start, n_init=1, algorithm="lloyd", tol=0).fit(values[:, None])
    codebook, index = find_codebook(values, bits)
    np.testing.assert_allclose(codebook, np.sort(reference.cluster_centers_[:, 0]), atol=1e-5)
    assert inertia(values, codebook, index) == pytest.approx(reference.inertia_, rel=1e-4)


def inertia(values, codebook, index):
    return np.square(codebook[index - 1] - values).sum()


@pytest.mark.parametrize("seed", range(6))
def test_empty_clusters_begin_anew_as_those_of_scikit_learn(seed):
    """The stem of ResNet-20 has few weights for 64 values on a line, and many of them begin without any weight."""
    torch.manual_seed(seed)
    values = CifarResNet(depth=20, num_classes=10).conv_1_3x3.weight.detach().double().numpy().ravel()
    start = np.linspace(values.min(), values.max(), 64)[:, None]
    reference = KMeans(64, init=start, n_init=1, algorithm="lloyd").fit(values[:, None])
    codebook, index = find_codebook(values, 6)
    assert codebook.size == 64
    # Not the same bits: of two values equally far the one or the other goes first. Centroids here are means, there nearly so.
    assert inertia(values, codebook, index) <= reference.inertia_ * (1 + 1e-9)
    assert inertia(values, codebook, index) == pytest.approx(reference.inertia_, rel=0.01)


def test_a_cluster_that_loses_its_weights_begins_anew_far_from_the_others():
    codebook, index = find_codebook(np.array([1, 1.1, 1.2, 1.3, 1.4, 100], np.float32), 2)
    assert codebook.size == 4 and codebook[-1] == 100
    assert sorted(set(index.tolist())) == [1, 2, 3, 4]


@given(st.lists(st.floats(-100, 100, width=32), max_size=60), st.integers(1, 4))
def test_every_entry_is_the_mean_of_its_values_and_zeros_stay_zero(values, bits):
    values = np.array(values, np.float32)
    codebook, index = find_codebook(values, bits)
    assert codebook.size <= 2**bits and np.all(np.diff(codebook) >= 0)
    np.testing.assert_array_equal(index == 0, values == 0)
    for entry, value in enumerate(codebook, start=1):
        np.testing.assert_allclose(value, values[index == entry].mean(dtype=np.float64), rtol=1e-5, atol=1e-30)


def test_a_layer_of_few_values_keeps_them():
    values = np.random.default_rng(0).choice(np.array([-0.3, 0, 0.1, 0.7], np.float32), 50)
    codebook, index = find_codebook(values, 2)
    np.testing.assert_array_equal(np.r_[np.float32(0), codebook][index], values)


def test_sixteen_bits():
    values = np.random.default_rng(0).normal(size=70_000).astype(np.float32)
    codebook, index = find_codebook(values, 16)
    assert 60_000 < codebook.size <= 65_536
    assert np.abs(codebook[index - 1] - values).max() < 1e-3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_update_is_that_of_the_paper(memory_format):
    """Han et al., equation 3: the gradients of a cluster are added up, every weight in it moves by the learning rate times it."""
    network = small_network().to(memory_format=memory_format)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        network[0].weight[1] = 0
    share_weights(network, {"0": 3, "3": 2})
    before = {name: network.get_submodule(name).weight.detach().clone().requires_grad_() for name in ("0", "3")}
    hidden = F.relu(F.conv2d(images, before["0"])).flatten(1)
    F.cross_entropy(F.linear(hidden, before["3"], network[3].bias), labels).backward()

    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    F.cross_entropy(network(images), labels).backward()
    optimizer.step()
    for name, weight in before.items():
        values, gradients = weight.detach().numpy(), weight.grad.numpy()
        expected = values.copy()
        for value in np.unique(values[values != 0]):
            expected[values == value] = value - 0.1 * gradients[values == value].sum()
        np.testing.assert_allclose(network.get_submodule(name).weight.detach(), expected, rtol=1e-4, atol=1e-6)


def test_sharing_changes_no_more_than_the_values():
    network = small_network().to(memory_format=torch.channels_last)
    assert share_weights(network, {"0": 4}) == {"0": 16}
    weight = network[0].weight
    assert weight.unique().numel() == 16 and weight.is_contiguous(memory_format=torch.channels_last)
    assert {name for name, _ in network.named_parameters()} == {"0.parametrizations.weight.original", "3.weight", "3.bias"}


def test_zeros_stay_zero_under_any_optimizer():
    network = small_network()
    with torch.no_grad():
        network[3].weight[:, ::2] = 0
    share_weights(network, {"0": 5, "3": 5})
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    assert not network[3].weight[:, ::2].any()
    assert network[3].weight[:, 1::2].unique().numel() == 32


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_layers_without_weights(shape):
    network = nn.Sequential(nn.Linear(shape[1], shape[0]))
    share_weights(network, {"0": 5})
    network(torch.ones(2, shape[1])).sum().backward()
    assert bake_weights(network)[0].weight.shape == shape


def test_a_layer_of_zeros():
    network = nn.Sequential(nn.Linear(3, 2))
    nn.init.zeros_(network[0].weight)
    share_weights(network, {"0": 1})
    network(torch.ones(2, 3)).sum().backward()
    assert not network[0].weight.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    network = small_network().to(dtype)
    share_weights(network, {"3": 4})
    assert network[3].weight.dtype == dtype and network[3].weight.unique().numel() <= 16
    network(torch.randn(2, 3, 8, 8, dtype=dtype)).sum().backward()


def test_baking_gives_plain_weights_back():
    network = small_network()
    names = set(network.state_dict())
    share_weights(network, {"0": 2, "3": 3})
    images = torch.randn(2, 3, 8, 8)
    shared = network(images)
    assert set(bake_weights(network).state_dict()) == names
    assert torch.equal(network(images), shared)
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in network.parameters())


def test_baking_a_copy_leaves_the_original_shared():
    network = small_network()
    share_weights(network, {"0": 2, "3": 3})
    baked = bake_weights(copy.deepcopy(network))
    assert type(baked[0]) is nn.Conv2d
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(baked(images), network(images))
    with torch.no_grad():
        network[0].parametrizations.weight.original.zero_()
    assert not network[0].weight.any() and baked[0].weight.all()


def test_the_step_compiles_whole():
    network = small_network()
    share_weights(network, {"0": 3, "3": 3})
    images = torch.randn(2, 3, 8, 8)
    network(images).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    torch.compile(network, backend="aot_eager", fullgraph=True)(images).square().sum().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    network = small_network()
    with torch.no_grad():
        network[3].weight[0, 0] = value
    with pytest.raises(ValueError, match="layer 3"):
        share_weights(network, {"3": 5})


@pytest.mark.parametrize(
    ("mode", "bits", "expected"),
    [
        ("all-quan", ["5"], {"0": 5, "3": 5}),
        ("all", ["4", "3=8"], {"0": 4, "3": 8}),
        ("conv-quan", ["16"], {"0": 16}),
        ("fc", ["1"], {"3": 1}),
        ("all-quan", ["0=2"], {"0": 2}),
    ],
)
def test_bits_by_layer(mode, bits, expected):
    assert layer_bits(small_network(), mode=mode, bits=bits) == expected


@pytest.mark.parametrize(
    ("mode", "bits", "message"),
    [
        ("all", ["0"], "bits 0: expected 1 to 16"),
        ("all", ["17"], "bits 17: expected 1 to 16"),
        ("all", ["9" * 5000], "expected 1 to 16"),
        ("all", ["five"], "bits five"),
        ("all", ["0=x"], "bits 0=x: expected"),
        ("all", ["fc9=5"], "bits fc9=5: no layer 'fc9' .* choose from 0, 3"),
        ("conv", ["3=5"], "bits 3=5: no layer '3'"),
        ("all", ["=5"], "bits =5: no layer ''"),
        ("all", ["5", "6"], "bits 6: given twice"),
        ("all", ["0=5", "0=6"], "bits 0=6: given twice"),
        ("some", ["5"], "mode some: unknown"),
    ],
)
def test_bad_bits(mode, bits, message):
    with pytest.raises(ValueError, match=message) as error:
        layer_bits(small_network(), mode=mode, bits=bits)
    assert "\n" not in str(error.value)
