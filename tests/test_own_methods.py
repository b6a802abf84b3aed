"""Criteria and losses in a file of one's own: they train, resume with the same code, and never run because a file says so."""

import json
import re
import shutil
from pathlib import Path

import methods_of_others
import pytest

from distill.registry import DISTILLERS
from prune.criteria import CRITERIA

PRUNE = "--s-copy-t --t-model resnet8 --prune-rates 0.6 --limit-batches 2 --batch-size 32 --device cpu --seed 3"


@pytest.fixture(autouse=True)
def _registries_stay():
    before = [dict(CRITERIA), dict(DISTILLERS)]
    yield
    for registry, entries in zip((CRITERIA, DISTILLERS), before, strict=True):
        for name in registry.keys() - entries.keys():
            del registry[name]


@pytest.fixture
def file(tmp_path):
    """The user's file, in a folder of its own."""
    return shutil.copy(methods_of_others.__file__, tmp_path / "mine.py")


@pytest.fixture
def prune(tmp_path, trained_run, run_script):
    def run(*words, epochs="1"):
        places = ["--t-path", str(trained_run), "--save-dir", str(tmp_path / "saves"), "--run-name", "run"]
        return run_script("pruning", *PRUNE.split(), *places, "--n-epochs", epochs, *words)

    return run


def test_an_own_criterion_and_an_own_loss_train_and_resume(prune, file, tmp_path, run_script):
    words = [
        "--prune-mode",
        f"{file}:sensitivity",
        "--samp-batches",
        "1",
        "--distill",
        f"{file}:Matched",
        f"{file}:logit_distance",
    ]
    ended = prune(*words, "--betas", "3", "2")
    assert ended.status == 0, ended.errors
    folder = tmp_path / "saves" / "run"
    config = json.loads((folder / "config.json").read_text())
    assert config["code"].keys() == {f"{file}:{name}" for name in ("sensitivity", "Matched", "logit_distance")}
    terms = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("Matched" in line for line in terms)

    unnamed = run_script("pruning", "--resume", str(folder), "--n-epochs", "2")
    assert unnamed.status == 2 and "code that never runs because a file names it; give --" in unnamed.errors
    other = run_script("pruning", "--resume", str(folder), "--n-epochs", "2", "--prune-mode", "l1", *words[4:])
    assert other.status == 2 and "a resumed run keeps its flags" in other.errors
    named = run_script("pruning", "--resume", str(folder), "--n-epochs", "2", "--prune-mode", words[1], *words[4:])
    assert named.status == 0, named.errors
    with open(file, "a") as changed:
        changed.write("\n# another thought\n")
    edited = run_script("pruning", "--resume", str(folder), "--n-epochs", "3", "--prune-mode", words[1], *words[4:])
    assert edited.status == 2 and f"--prune-mode {file}:sensitivity: is not the code that {folder} began with" in edited.errors


@pytest.mark.parametrize("name", ["largest_weight", "map_energy", "of_its_group"])
def test_other_criteria_of_ones_own(prune, file, name):
    ended = prune("--prune-mode", f"{file}:{name}", epochs="0")
    assert ended.status == 0, ended.errors


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("--prune-mode", "nothing", "mine.py defines no nothing; it has"),
        ("--prune-mode", "of_no_maps", "asks for feature_maps, so of_no_maps.of_maps must be a function"),
        ("--prune-mode", "asks_for_more", "asks for weather; beside the weight it may ask for bn_weight, feature_maps"),
        ("--prune-mode", "too_few", "too_few gives scores of shape (1,), expected one finite number a filter, ("),
        ("--prune-mode", "not_finite", "not_finite gives scores that are not finite"),
        ("--prune-mode", "raises", "mine.py line 43: IndexError: Dimension out of range"),
        ("--distill", "nothing", "mine.py defines no nothing; it has"),
        ("--distill", "an_image_each", "gives a tensor ("),
        ("--distill", "a_number", "gives float, expected one number, a 0-dim tensor of floats"),
        ("--distill", "detached", "detached: its gradient does not reach the student"),
        ("--distill", "infinite", "infinite: gives inf for a first batch, expected a finite number"),
        ("--distill", "infinite_slope", "infinite_slope: its gradient is not finite for a first batch"),
        ("--distill", "fails", "mine.py line 90: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("--distill", "kd", "something else is called so here, name it otherwise than kd"),
        ("--distill", "asks_for_time", "asks for clock, which nobody gives it; by keyword it may ask for labels"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(prune, file, tmp_path, flag, name, message):
    ended = prune(flag, f"{file}:{name}")
    assert ended.status == 2 and ended.errors.count("\n") == 1
    assert f"{file}:{name}" in ended.errors and message in ended.errors
    assert not (tmp_path / "saves").exists()


def test_labels_are_given_to_a_loss_that_asks(prune, file):
    ended = prune("--distill", f"{file}:labelled", "--dry-run")
    assert ended.status == 0, ended.errors
    assert "LABELLED" in ended.output


def test_the_file_of_the_page_works_as_it_stands(prune, tmp_path):
    page = (Path(__file__).resolve().parent.parent / "docs" / "extending.md").read_text()
    (block,) = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "page.py").write_text(block)
    for criterion in ("largest_weight", "sensitivity"):
        methods = ["--prune-mode", f"{tmp_path}/page.py:{criterion}", "--distill", f"{tmp_path}/page.py:logit_distance"]
        ended = prune(*methods, "--dry-run")
        assert ended.status == 0, ended.errors
        assert "2 LOGIT_DISTANCE" in ended.output
