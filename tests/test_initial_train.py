"""Training a network through its entry script."""

import json

import torch

from models.network_file import load_network
from utils.data import ImageData
from utils.datasets import load_dataset


def test_what_a_run_leaves(trained_run):
    left = {path.name for path in trained_run.iterdir()}
    assert left >= {"model_best.pt", "model_last.pt", "config.json", "metrics.jsonl", "summary.json", "log"}
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["split"]) for line in lines] == [(0, "train"), (0, "test"), (1, "train"), (1, "test")]
    assert all(line.keys() >= {"loss", "top1", "top5", "lr", "seconds", "images_per_second"} for line in lines)
    summary = json.loads((trained_run / "summary.json").read_text())
    tests = [line["top1"] for line in lines if line["split"] == "test"]
    assert (summary["last"]["top1"], summary["best"]["top1"]) == (tests[-1], max(tests))
    assert any(
        "model resnet20" in line or "epoch 2/2" in line
        for line in (trained_run.parent / "initial_train.txt").read_text().splitlines()
    )


def test_the_recorded_accuracy_is_that_of_the_saved_network(trained_run):
    file = load_network(trained_run / "model_best.pt", flag="--load-path")
    data = ImageData(load_dataset("digits"), batch_size=32, seed=0, device=torch.device("cpu"), limit_batches=2)
    with torch.no_grad():
        right = [(file.network(images).argmax(1) == labels).float() for images, labels, _ in data.test_batches()]
    assert torch.cat(right).mean().item() * 100 == file.metrics["top1"]


def test_evaluate_prints_it_and_writes_nothing(trained_run, tmp_path, run_script):
    best = trained_run / "model_best.pt"
    flags = ["--batch-size", "32", "--limit-batches", "2", "--save-dir", str(tmp_path / "saves"), "--device", "cpu"]
    ended = run_script("initial_train", "--evaluate", "--load-path", str(best), *flags)
    metrics = load_network(best, flag="--load-path").metrics
    assert ended.status == 0
    assert f"top1 {metrics['top1']:.2f}" in ended.output and "over 64 images" in ended.output
    assert not (tmp_path / "saves").exists()


def test_a_dry_run_tells_sizes_and_steps_and_writes_nothing(tmp_path, run_script):
    flags = ["--n-epochs", "3", "--schedule", "1", "--lr-drops", "10", "--save-dir", str(tmp_path / "saves"), "--device", "cpu"]
    ended = run_script("initial_train", "--model", "resnet20", "--dry-run", *flags)
    assert ended.status == 0
    assert "269,722 parameters" in ended.output
    assert "36 steps in all" in ended.output  # 1,437 images: 11 batches of 128 and one of 29, three times
    assert "0.01 from epoch 1, 0.1 from epoch 2" in ended.output
    assert not (tmp_path / "saves").exists()


def test_a_diverging_run_stops_and_says_where(tmp_path, run_script):
    flags = ["--lr", "1e30", "--schedule", "--n-epochs", "2", "--batch-size", "32", "--limit-batches", "4", "--device", "cpu"]
    ended = run_script("initial_train", "--model", "resnet20", *flags, "--save-dir", str(tmp_path), "--run-name", "run")
    assert ended.status == 1
    assert "no finite number at epoch 1, step 2" in ended.errors and ended.errors.count("\n") == 1
    assert not (tmp_path / "run" / "model_best.pt").exists()
