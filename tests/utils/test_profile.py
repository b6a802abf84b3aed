"""Counts of small networks worked out by hand."""

import copy

import pytest
import torch
from torch import nn

from models.cifar_resnet import CifarResNet
from utils import profile
from utils.engine import CrossEntropyObjective
from utils.profile import compare_networks, comparison_table, latency, papers_flops_drop, profile_network, training_flops

IMAGE = torch.randn(1, 3, 8, 8)


def chain(first: int, second: int) -> nn.Module:
    """Two 3x3 convolutions, the second one with stride 2, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second, 5),
    )


def test_profile_by_hand():
    network = chain(4, 6).train()
    with torch.no_grad():
        network[3].weight[:2] = 0
    sizes = profile_network(network, IMAGE)
    assert sizes["parameters"] == 3 * 4 * 9 + 2 * 4 + (4 * 6 * 9 + 6) + (6 * 5 + 5)
    assert sizes["nonzero_parameters"] == sizes["parameters"] - 2 * 4 * 9 - 4  # a fresh batch norm's 4 biases are zero too
    assert sizes["macs"] == 64 * 3 * 4 * 9 + 16 * 4 * 6 * 9 + 6 * 5
    assert sizes["flops"] == 2 * sizes["macs"]
    assert network.training


def test_papers_flops_drop_by_hand():
    dense, small = chain(4, 6), chain(3, 2)
    before = 64 * 3 * 4 * 9 + 16 * 4 * 6 * 9
    after = 64 * 3 * 4 * 9 * 3 / 4 + 16 * 4 * 6 * 9 * (3 / 4) * (2 / 6)
    assert papers_flops_drop(dense, small, IMAGE) == pytest.approx(100 * (1 - after / before))


def test_papers_flops_drop_is_the_published_one():
    """SFP and FPGM state 52.6 % for ResNet-56 with 40 % of all filters pruned; exactly 0.6, which no real network can have."""
    dense = CifarResNet(depth=56, num_classes=10).eval()
    small = copy.deepcopy(dense)
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            module.out_channels *= 0.6
    assert papers_flops_drop(dense, small, torch.randn(1, 3, 32, 32)) == pytest.approx(52.6, abs=0.1)


def test_a_layer_that_is_gone_costs_nothing():
    dense, small = chain(4, 6), chain(4, 6)
    small[3] = nn.Identity()
    left = nn.Module()
    left.add_module("0", small[0])
    before = 64 * 3 * 4 * 9 + 16 * 4 * 6 * 9
    assert papers_flops_drop(dense, left, IMAGE) == pytest.approx(100 * (1 - 64 * 3 * 4 * 9 / before))


def test_flops_of_a_training_step_worked_by_hand():
    network = chain(4, 6)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    first, second, linear = 64 * 3 * 4 * 9, 16 * 4 * 6 * 9, 30
    # Forward once; backward once for the weights and once for the inputs, but for those of the first layer, the images.
    expected = 2 * (3 * (first + second + linear) - first)
    random = torch.get_rng_state()
    assert training_flops(CrossEntropyObjective(network), IMAGE) == expected
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_latency_of_anything_that_takes_images(monkeypatch):
    monkeypatch.setattr(profile, "MIN_RUN_SECONDS", 0.0)
    seen = []
    times = latency(lambda images: seen.append(len(images)), IMAGE, batch_sizes=(1, 7))
    assert set(seen) == {1, 7} and list(times) == ["1", "7"]
    assert all(time["median_ms"] > 0 and time["iqr_ms"] >= 0 for time in times.values())


def test_comparison_and_its_table(monkeypatch, tmp_path):
    monkeypatch.setattr(profile, "MIN_RUN_SECONDS", 0.0)
    files = [tmp_path / "dense", tmp_path / "small"]
    for file, size in zip(files, (3000, 1000), strict=True):
        file.write_bytes(bytes(size))
    comparison = compare_networks(chain(4, 6).eval(), chain(2, 6).eval(), IMAGE, files=files)
    assert comparison["dense"]["file_bytes"] == 3000
    lines = comparison_table(comparison).splitlines()
    assert lines[0].split() == ["dense", "compact", "ratio"]
    macs = [64 * 3 * 4 * 9 + 16 * 4 * 6 * 9 + 30, 64 * 3 * 2 * 9 + 16 * 2 * 6 * 9 + 30]
    assert f"{macs[0]:,}" in lines[2] and f"{macs[1]:,}" in lines[2] and f"{macs[0] / macs[1]:.2f}x" in lines[2]
    assert any(line.startswith("file bytes") and line.endswith("3.00x") for line in lines)
    assert "50.0 % less" in lines[-1]
