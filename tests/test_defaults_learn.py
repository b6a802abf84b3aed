"""Every loss and every criterion, at its default weights and options, ends well above chance on real digits."""

import json

import pytest

from distill.registry import DISTILLERS
from prune.criteria import CRITERIA

CHANCE = 10.0  # percent, of ten digits
DATA = ("--dataset", "digits", "--batch-size", "64", "--device", "cpu")
STUDENT = ["--n-epochs", "3", "--lr", "0.05", "--lr-schedule", "linear", "--prune-rates", "0.6"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, run_script) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    recipe = ["--model", "resnet8", "--n-epochs", "6", "--lr", "0.1", "--lr-schedule", "linear", "--warmup-epochs", "1"]
    place = ["--save-dir", str(folder), "--run-name", "teacher"]
    ended = run_script("initial_train", *recipe, *DATA, *place)
    assert ended.status == 0, ended.errors
    summary = json.loads((folder / "teacher" / "summary.json").read_text())
    assert summary["last"]["top1"] > 90
    return str(folder / "teacher" / "model_last.pt")


@pytest.fixture
def last_top1(teacher, tmp_path, run_script):
    """The accuracy in percent after three epochs of a pruning with some flags."""

    def run(*flags: str) -> float:
        networks = ("--t-path", teacher, "--s-copy-t")
        ended = run_script("pruning", *networks, *DATA, *STUDENT, *flags, "--save-dir", str(tmp_path), "--run-name", "run")
        assert ended.status == 0, ended.errors
        return json.loads((tmp_path / "run" / "summary.json").read_text())["last"]["top1"]

    return run


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(DISTILLERS))
def test_no_loss_collapses(last_top1, name):
    assert last_top1("--prune-mode", "filter-nggm", "--samp-batches", "4", "--distill", name) > 5 * CHANCE


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_no_criterion_collapses(last_top1, name):
    assert last_top1("--prune-mode", name) > 5 * CHANCE
