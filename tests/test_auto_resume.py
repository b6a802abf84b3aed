"""One command line for every attempt at a run: it begins it, goes on with it, and leaves it alone once it is complete."""

import os
import shutil
import signal

import pytest

from benchmarks.kill_test import RECIPES, RUN, differences, moments_of, start, wait

SOFT = next(recipe for recipe in RECIPES if recipe.name == "soft + HAP")
TRAINING = ["--model", "resnet8", "--run-name", "run", "--n-epochs", "2", "--limit-batches", "2", "--batch-size", "16"]
TRAINING += ["--schedule", "--lr-drops", "--auto-resume"]


def attempt(folder, words, *, script="initial_train", **kill):
    return wait(start(script, words, folder=folder, **kill))


def output(folder):
    return (folder / "output.txt").read_text()


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which TRAINING came to its end undisturbed."""
    folder = tmp_path_factory.mktemp("trained")
    assert attempt(folder, TRAINING) == 0, output(folder)
    return folder


def test_killed_again_and_again_it_ends_as_the_undisturbed_one(trained, tmp_path):
    moments = len(moments_of(trained))
    for fatal in (5, moments // 3, moments // 2):  # before the folder is there, and in two epochs
        assert attempt(tmp_path, TRAINING, fatal=fatal) == -signal.SIGKILL
    assert attempt(tmp_path, TRAINING) == 0, output(tmp_path)
    assert differences(trained / RUN, tmp_path / RUN) == []


def test_with_distillation_and_soft_pruning(trained_run, tmp_path):
    words = [*SOFT.words(trained_run / "model_best.pt"), "--auto-resume"]
    assert attempt(tmp_path / "untouched", words, script=SOFT.script) == 0
    fatal = len(moments_of(tmp_path / "untouched")) // 2
    assert attempt(tmp_path, words, script=SOFT.script, fatal=fatal) == -signal.SIGKILL
    assert attempt(tmp_path, words, script=SOFT.script) == 0, output(tmp_path)
    assert differences(tmp_path / "untouched" / RUN, tmp_path / RUN) == []


def test_a_complete_run_is_left_alone_until_its_epochs_are_raised(trained, tmp_path):
    shutil.copytree(trained / "saves", tmp_path / "saves")
    before = contents(tmp_path / RUN)
    assert attempt(tmp_path, TRAINING) == 0
    assert output(tmp_path) == f"{RUN}: complete\n"
    assert contents(tmp_path / RUN) == before
    without_batch_size = [word for word in TRAINING if word not in ("--batch-size", "16")]
    assert attempt(tmp_path, without_batch_size) == 2
    assert "saves/run has --batch-size 16, not 128" in output(tmp_path)
    assert contents(tmp_path / RUN) == before
    assert attempt(tmp_path, [*TRAINING, "--n-epochs", "3"]) == 0
    assert " 3/3 " in output(tmp_path) and " 2/3 " not in output(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TRAINING, "--lr", "0.5"], "--lr 0.5: contradicts 0.01 of saves/run"),
        (
            [word for word in TRAINING if word not in ("--batch-size", "16")],
            "--run-name run: saves/run has --batch-size 16, not 128",
        ),
        ([*TRAINING, "--ema", "0.9"], "--ema 0.9: contradicts None of saves/run"),
        ([*TRAINING, "--resume", "saves/run"], "--auto-resume: not with --resume saves/run"),
        ([word for word in TRAINING if word not in ("--run-name", "run")], "--auto-resume: needs --run-name"),
        ([*TRAINING, "--load-path", "other/model_best.pt"], "--load-path other/model_best.pt: contradicts None of saves/run"),
    ],
)
def test_another_run_of_that_name_is_refused(words, message, trained, tmp_path):
    shutil.copytree(trained / "saves", tmp_path / "saves")
    (tmp_path / RUN / "summary.json").unlink()
    before = contents(tmp_path / RUN)
    assert attempt(tmp_path, words) == 2
    assert message in output(tmp_path) and output(tmp_path).count("\n") == 1
    assert contents(tmp_path / RUN) == before


def test_no_network_is_taken_from_a_run_that_is_not_complete(trained, tmp_path):
    shutil.copytree(trained / "saves", tmp_path / "saves")
    os.rename(tmp_path / RUN, tmp_path / "saves" / "teacher")
    words = "--t-path saves/teacher/model_best.pt --s-copy-t --prune-rates 0.6 --run-name run --n-epochs 1 --limit-batches 2"
    words = [*words.split(), "--batch-size", "16", "--schedule", "--lr-drops", "--auto-resume"]
    summary = (tmp_path / "saves" / "teacher" / "summary.json").rename(tmp_path / "summary.json")
    assert attempt(tmp_path, words, script="pruning") == 2
    refusal = "pruning.py: error: --t-path saves/teacher/model_best.pt: the run that writes it is not complete yet\n"
    assert output(tmp_path) == refusal and not (tmp_path / RUN).exists()
    summary.rename(tmp_path / "saves" / "teacher" / "summary.json")
    assert attempt(tmp_path, words, script="pruning") == 0, output(tmp_path)


def test_a_network_of_ones_own_file_is_resumed_since_its_name_is_typed_again(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def small(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(4, num_classes))\n"
    )
    words = ["--model", "nets.py:small", *TRAINING[2:]]
    assert attempt(tmp_path / "untouched", ["--model", "../nets.py:small", *TRAINING[2:]]) == 0, output(tmp_path / "untouched")
    assert attempt(tmp_path, words, fatal=len(moments_of(tmp_path / "untouched")) // 2) == -signal.SIGKILL
    assert attempt(tmp_path, words) == 0, output(tmp_path)
    assert (tmp_path / RUN / "summary.json").exists()
