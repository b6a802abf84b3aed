"""Pruning without a step of training: `--n-epochs 0`."""

import json
from pathlib import Path

import pytest
import torch

from models.network_file import load_network

FLAGS = [
    "--s-copy-t",
    "--prune-mode",
    "filter-a",
    "--limit-batches",
    "2",
    "--batch-size",
    "32",
    "--device",
    "cpu",
    "--n-epochs",
    "0",
]
BUDGET = ["--budget", "macs=0.5", "--couple-channels"]


@pytest.fixture
def words(trained_run, tmp_path) -> list[str]:
    return [*FLAGS, "--t-path", str(trained_run / "model_best.pt"), "--save-dir", str(tmp_path), "--run-name", "run"]


def test_it_leaves_all_that_a_run_does_and_trains_when_it_is_resumed(words, tmp_path, run_script):
    ended = run_script("pruning", *words, *BUDGET, "--reconstruct", "64", "--recalibrate-bn", "1")
    assert ended.status == 0, ended.errors
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["last"] == summary["best"] and summary["training_flops"] == 0
    best, small = (load_network(folder / name, flag="").network for name in ("model_best.pt", "model_compact.pt"))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(images), best(images), atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in best.parameters())

    ended = run_script("pruning", "--resume", str(folder), "--n-epochs", "1")
    assert ended.status == 0, ended.errors
    assert json.loads((folder / "summary.json").read_text())["last"]["epoch"] == 0


@pytest.mark.parametrize("more", [[], ["--prune-rates", "0.5", "--soft-prune"]])
def test_it_is_for_what_is_pruned_for_good(words, tmp_path, run_script, more):
    mode = [] if more else ["--prune-mode"]
    given = [word for word in words if not (mode and word in ("--prune-mode", "filter-a"))]
    ended = run_script("pruning", *given, *more)
    assert ended.status == 2 and "--n-epochs 0: only where filters are pruned for good" in ended.errors
    assert not Path(tmp_path / "run").exists()
