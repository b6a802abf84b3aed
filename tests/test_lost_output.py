"""Scripts whose output goes nowhere, as shells start them: a training goes on, and what only prints says that it failed."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

TRAINING = "--model resnet20 --n-epochs 1 --limit-batches 1 --batch-size 16 --schedule --lr-drops --device cpu --run-name run"


def shell(script: str, words: str, redirection: str) -> subprocess.CompletedProcess[str]:
    command = f'set -o pipefail; "$0" {REPOSITORY / script} {words} {redirection}'
    return subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        (">/dev/full", "standard output cannot be written (No space left on device)"),
        ("2>&1 | true", "standard output cannot be written (Broken pipe)"),
        ("<&- >&- 2>&-", "standard output cannot be written (it is closed)"),
    ],
    ids=["full", "reader gone", "closed"],
)
def test_training_goes_on_and_its_log_says_so(redirection, reason, tmp_path):
    ended = shell("initial_train.py", f"{TRAINING} --save-dir {tmp_path}", redirection)
    assert ended.returncode == 0
    log = (tmp_path / "initial_train.txt").read_text()
    assert log.count(reason) == 1
    assert log.splitlines()[-1].endswith(str(tmp_path / "run" / "model_best.pt"))
    assert ended.stderr.count("\n") == (1 if redirection == ">/dev/full" else 0)
    assert (tmp_path / "run" / "summary.json").exists()


def test_what_is_only_printed_is_a_failure_where_it_is_lost(trained_run):
    words = f"--load-path {trained_run / 'model_best.pt'} --evaluate --limit-batches 1 --device cpu"
    ended = shell("initial_train.py", words, ">/dev/full")
    assert ended.returncode == 1
    assert ended.stderr == "initial_train.py: error: standard output cannot be written: No space left on device\n"
    ended = shell("initial_train.py", words, "| true")
    assert (ended.returncode, ended.stderr) == (141, "")


def test_an_error_is_said_on_the_stream_that_is_left():
    ended = shell("initial_train.py", "--model resnet20 --lr fast", "2>&-")
    assert ended.returncode == 2
    assert ended.stdout.startswith("initial_train.py: error: --lr: 'fast'")
