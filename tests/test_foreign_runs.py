"""Resuming a folder that somebody else made: it can decide how the run goes on, and nothing outside of it but its log."""

import json
import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def foreign(tmp_path, trained_run) -> Path:
    """A run in a folder of its own, in which a file of the user's and a place for others lie too."""
    (tmp_path / "mine").write_text("mine")
    return shutil.copytree(trained_run, tmp_path / "downloads" / "run")


def forge(run: Path, **flags) -> None:
    config = json.loads((run / "config.json").read_text())
    config["flags"] |= flags
    (run / "config.json").write_text(json.dumps(config))


def outside(folder: Path, run: Path) -> dict[Path, bytes | None]:
    """What lies in `folder` beside the run."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if run not in (path, *path.parents)}


def test_writes_into_its_folder_and_its_log_alone(foreign, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = str(tmp_path / "mine")
    forge(foreign, help=True, evaluate=True, dry_run=True, force=True, inspect=mine, output=mine, decode=mine, resume=mine)
    before = outside(tmp_path, foreign)
    ended = run_script("initial_train", "--resume", str(foreign), "--n-epochs", "3")
    assert ended.status == 0, ended.errors
    assert "done: last top1" in ended.output
    after = outside(tmp_path, foreign)
    assert after.pop(foreign.parent / "initial_train.txt")
    assert after == before


@pytest.mark.parametrize(
    "name", ["lock", "log", "metrics.jsonl", "model_last.pt", "model_best.pt", "summary.json", "config.json"]
)
def test_links_in_it_are_refused(name, foreign, tmp_path, run_script):
    place = foreign / name
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "mine")
    before = outside(tmp_path, foreign)
    ended = run_script("initial_train", "--resume", str(foreign), "--n-epochs", "3")
    assert (ended.status, ended.output) == (2, "")
    assert f"--resume {foreign}: {name} is a link, expected a" in ended.errors
    assert outside(tmp_path, foreign) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"log_name": "../mine"}, "'../mine', must be a plain name"),
        ({"log_name": "notes"}, "'notes', is another file there"),
        ({"lr_drops": ["--run-name=x"], "schedule": [1]}, "--lr-drops: '--run-name=x' is no value of a flag"),
        ({"decode=x --": "y"}, "unrecognized arguments"),
    ],
)
def test_forged_flags_are_refused(flags, message, foreign, tmp_path, run_script):
    (foreign.parent / "notes").write_text("what should stay as it is")
    forge(foreign, **flags)
    before = outside(tmp_path, foreign)
    ended = run_script("initial_train", "--resume", str(foreign), "--n-epochs", "3")
    assert (ended.status, ended.output, len(ended.errors.splitlines())) == (2, "", 1)
    assert message in ended.errors
    assert outside(tmp_path, foreign) == before


def test_downloads_only_into_a_folder_that_was_typed(foreign, tmp_path, run_script):
    forge(foreign, dataset="cifar10", data_dir=str(tmp_path / "elsewhere"))
    ended = run_script("initial_train", "--resume", str(foreign), "--n-epochs", "3")
    assert ended.status == 2
    assert "--dataset cifar10" in ended.errors
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("typed", [(), ("--model", "nets.py:tiny")])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_code_that_only_the_run_names_is_not_even_opened(kind, typed, foreign, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text("def tiny(num_classes): ...")
    place = tmp_path / "code.py"
    os.mkfifo(place) if kind == "pipe" else place.symlink_to("/dev/zero")
    forge(foreign, model=f"{place}:network")
    ended = run_script("initial_train", "--resume", str(foreign), "--n-epochs", "3", *typed)
    assert (ended.status, ended.output, len(ended.errors.splitlines())) == (2, "", 1)
    assert f"began with --model {place}:network" in ended.errors
