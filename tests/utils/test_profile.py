"""Counts of small networks worked out by hand."""

from functools import partial

import torch
from torch import nn

from utils import profile
from utils.profile import compare_networks, comparison_table, latencies, profile_network, training_flops
from utils.training.objective import CrossEntropyObjective

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


def test_latencies_of_anything_that_takes_images_turn_by_turn(monkeypatch):
    monkeypatch.setattr(profile, "MIN_RUN_SECONDS", 0.0)
    seen = []
    networks = {name: partial(lambda name, images: seen.append((name, len(images))), name) for name in ("a", "b")}
    times = latencies(networks, IMAGE, batch_sizes=(1, 7))
    rounds = len(seen) // 4
    assert rounds >= profile.MIN_ROUNDS
    assert seen == [("a", 1), ("b", 1)] * rounds + [("a", 7), ("b", 7)] * rounds
    for name in networks:
        assert list(times[name]) == ["1", "7"]
        assert all(time["median_ms"] > 0 and time["iqr_ms"] >= 0 for time in times[name].values())


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
