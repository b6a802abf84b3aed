"""Training a network through its entry script."""

import json
import shutil

import torch

from models.network_file import load_network
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.images.batches import ImageData
from utils.images.datasets import load_dataset


def test_what_a_run_leaves(trained_run):
    left = {path.name for path in trained_run.iterdir()}
    assert left >= {"model_best.pt", "model_last.pt", "config.json", "metrics.jsonl", "summary.json", "log"}
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["split"]) for line in lines] == [(0, "train"), (0, "test"), (1, "train"), (1, "test")]
    assert all(line.keys() >= {"loss", "top1", "top5", "lr", "seconds", "images_per_second"} for line in lines)
    summary = json.loads((trained_run / "summary.json").read_text())
    tests = [line["top1"] for line in lines if line["split"] == "test"]
    assert (summary["last"]["top1"], summary["best"]["top1"]) == (tests[-1], max(tests))
    classes = summary["classes"]
    right, seen = sum(row[number] for number, row in enumerate(classes["confusion"])), sum(classes["images"])
    assert round(100 * right / seen, 6) == round(summary["last"]["top1"], 6) and len(classes["names"]) == 10
    assert any(
        "model resnet8" in line or "epoch 2/2" in line
        for line in (trained_run.parent / "initial_train.txt").read_text().splitlines()
    )


def test_the_recorded_accuracy_is_that_of_the_saved_network(trained_run):
    file = load_network(trained_run / "model_best.pt", flag="--load-path")
    data = ImageData(load_dataset("digits"), batch_size=32, seed=0, device=torch.device("cpu"), limit_batches=2)
    with torch.no_grad():
        right = [(file.network(images).argmax(1) == labels).float() for images, labels, *_ in data.test_batches()]
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
    ended = run_script("initial_train", "--model", "resnet8", "--dry-run", *flags)
    assert ended.status == 0
    assert "75,290 parameters" in ended.output
    assert "36 steps in all" in ended.output  # 1,437 images: 11 batches of 128 and one of 29, three times
    assert "0.01 from epoch 1, 0.1 from epoch 2" in ended.output
    assert not (tmp_path / "saves").exists()


def test_a_diverging_run_stops_and_says_where(tmp_path, run_script):
    flags = ["--lr", "1e18", "--schedule", "--n-epochs", "2", "--batch-size", "32", "--limit-batches", "4", "--device", "cpu"]
    ended = run_script("initial_train", "--model", "resnet8", *flags, "--save-dir", str(tmp_path), "--run-name", "run")
    assert ended.status == 1
    assert "no finite number at epoch 1, step 2" in ended.errors and ended.errors.count("\n") == 1
    assert not (tmp_path / "run" / "model_best.pt").exists()


TINY = [
    "--n-epochs",
    "1",
    "--limit-batches",
    "2",
    "--batch-size",
    "32",
    "--lr",
    "1e-9",
    "--schedule",
    "--lr-drops",
    "--weight-decay",
    "0",
    "--device",
    "cpu",
]


def test_a_file_is_fine_tuned_from_its_weights(trained_run, tmp_path, run_script):
    best = trained_run / "model_best.pt"
    ended = run_script("initial_train", "--load-path", str(best), *TINY, "--save-dir", str(tmp_path), "--run-name", "run")
    assert ended.status == 0, ended.errors
    before, after = load_network(best, flag="--load-path"), load_network(tmp_path / "run" / "model_best.pt", flag="--load-path")
    assert after.model == "resnet8"
    torch.testing.assert_close(after.network.classifier.weight, before.network.classifier.weight, rtol=0, atol=1e-6)
    assert set(json.loads((tmp_path / "run" / "config.json").read_text())["networks"]) == {"--load-path"}


def test_what_is_pruned_in_the_file_stays_pruned(trained_run, tmp_path, run_script):
    checkpoint = load_checkpoint(trained_run / "model_best.pt")
    pruned, kept = [1, 5, 6], sorted({*range(16)} - {1, 5, 6})
    for name in ("conv_a.weight", "bn_a.weight", "bn_a.bias"):
        checkpoint["state_dict"][f"stage_1.0.{name}"][pruned] = 0
    checkpoint["kept"] = {"stage_1.0.conv_a": kept, "stage_1.0.bn_a": kept}
    save_checkpoint(tmp_path / "pruned.pt", checkpoint)
    flags = ["--save-dir", str(tmp_path), "--run-name", "run"]
    ended = run_script("initial_train", "--load-path", str(tmp_path / "pruned.pt"), *TINY, "--lr", "0.1", *flags)
    assert ended.status == 0, ended.errors
    state = load_checkpoint(tmp_path / "run" / "model_last.pt")
    assert state["kept"]["stage_1.0.conv_a"] == kept
    weight = state["state_dict"]["stage_1.0.conv_a.weight"]
    assert weight[pruned].eq(0).all() and not torch.equal(weight, checkpoint["state_dict"]["stage_1.0.conv_a.weight"])


def test_fine_tuning_goes_on_only_with_the_file_it_began_with(trained_run, tmp_path, run_script):
    file = tmp_path / "start.pt"
    shutil.copy(trained_run / "model_best.pt", file)
    flags = ["--save-dir", str(tmp_path), "--run-name", "run"]
    assert run_script("initial_train", "--load-path", str(file), *TINY, *flags).status == 0
    run = str(tmp_path / "run")
    assert run_script("initial_train", "--resume", run, "--n-epochs", "2").status == 0
    checkpoint = load_checkpoint(file)
    checkpoint["state_dict"]["classifier.bias"] += 1
    save_checkpoint(file, checkpoint)
    ended = run_script("initial_train", "--resume", run, "--n-epochs", "3")
    assert ended.status == 2 and f"--load-path {file}: holds other weights" in ended.errors


LAGGING = """
from torch import nn

def lagging(num_classes):
    conv, norm = nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16, momentum=1e-4)
    nn.init.constant_(conv.bias, -100)  # which the statistics of a batch take away, and those that lag do not
    return nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, num_classes))
"""


def test_statistics_that_lag_are_named_and_estimated_anew(tmp_path, run_script):
    (tmp_path / "nets.py").write_text(LAGGING)
    words = ["--model", f"{tmp_path / 'nets.py'}:lagging", "--n-epochs", "3", "--batch-size", "64", "--lr", "0.1"]
    words += ["--device", "cpu"]
    words += ["--schedule", "--lr-drops", "--mean", "0", "0", "0", "--std", "1", "1", "1", "--save-dir", str(tmp_path)]
    late = run_script("initial_train", *words, "--run-name", "late")
    assert late.status == 0, late.errors
    assert late.output.count("--recalibrate-bn estimates them anew") == 1
    anew = run_script("initial_train", *words, "--run-name", "anew", "--recalibrate-bn", "4")
    assert anew.status == 0 and "--recalibrate-bn estimates" not in anew.output
    top1 = {name: json.loads((tmp_path / name / "summary.json").read_text())["last"]["top1"] for name in ("late", "anew")}
    assert top1["late"] < 15 and top1["anew"] > 50
