"""Reconstruction within a run: which images, and in which form of the network."""

import copy
import json

import pytest
import torch
from selections import selected
from torch import nn

from models import build_model
from prune.mending import images_needed, mend_pruned
from prune.schedule import HardPruning, PhysicalPruning
from utils.images.batches import ImageData
from utils.images.datasets import load_dataset


def test_the_images_needed_are_those_of_the_layer_with_the_fewest_rows_for_its_weights():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 2))
    # rows an image: 16, 4 and 1; weights of a filter: 27, 36 and 16, each of which is to have 4 rows
    assert images_needed(network, torch.randn(1, 3, 6, 6)) == 64
    wide = nn.Sequential(nn.Flatten(), nn.Linear(50, 2))
    assert images_needed(wide, torch.randn(1, 50)) == 4 * 50
    assert images_needed(nn.Sequential(nn.Linear(5000, 2)), torch.randn(1, 5000)) == 256


@pytest.fixture(scope="module")
def data() -> ImageData:
    return ImageData(load_dataset("digits"), batch_size=16, seed=3, device=torch.device("cpu"))


def test_plain_images_are_training_images_as_they_are_tested(data):
    images = torch.cat(data.plain_batches(40))
    assert images.shape == (40, 3, 32, 32)
    assert torch.equal(images, torch.cat(data.plain_batches(40)))
    everything = torch.cat(data.plain_batches(len(data.dataset.train.labels)))
    pixels = data.dataset.train.images / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.dataset.mean, data.dataset.std))
    torch.testing.assert_close(everything, (pixels - mean) / std, atol=1e-5, rtol=1e-5)


def test_both_forms_of_a_pruned_network_are_mended_alike(data):
    torch.manual_seed(0)
    network = build_model("resnet20", num_classes=10).eval()
    convs = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    kept = {name: torch.arange(0, len(network.get_submodule(name).weight), 2) for name in convs}
    selections = [selected(copy.deepcopy(network), kept, data.example) for _ in range(2)]
    schedules = [kind(own.graph, own) for kind, own in zip((HardPruning, PhysicalPruning), selections, strict=True)]
    batches = data.plain_batches(16)
    for schedule in schedules:
        mend_pruned(schedule, network, batches)
    masked, physical = (schedule.model.state_dict() for schedule in schedules)
    assert all(torch.equal(masked[key], physical[key]) for key in masked)
    small = schedules[1].trained_network().eval()
    torch.testing.assert_close(small(data.example), schedules[0].model(data.example), atol=1e-4, rtol=1e-4)


def test_a_run_says_what_it_mended(trained_run, tmp_path, run_script):
    teacher, budget = (
        ["--t-path", str(trained_run / "model_best.pt"), "--s-copy-t"],
        ["--budget", "macs=0.5", "--couple-channels"],
    )
    tiny = [
        "--n-epochs",
        "1",
        "--limit-batches",
        "2",
        "--batch-size",
        "32",
        "--schedule",
        "--device",
        "cpu",
        "--prune-mode",
        "filter-a",
    ]
    words = [*teacher, *tiny, *budget, "--reconstruct", "auto", "--save-dir", str(tmp_path), "--run-name", "run"]
    ended = run_script("pruning", *words)
    assert ended.status == 0, ended.errors
    document = json.loads((tmp_path / "run" / "reconstruction.json").read_text())
    assert document["images"] == 256 and len(document["layers"]) == 8
    assert all(layer["after"] <= layer["before"] for layer in document["layers"])
    before = json.loads((tmp_path / "run" / "before_training.json").read_text())
    assert {"pruned", "reconstructed"} <= before.keys()
    assert "reconstructed 8 layers from 256 training images" in ended.output
    assert f"pruned and reconstructed, before fine-tuning: top1 {before['reconstructed']['top1']:.2f}" in ended.output
