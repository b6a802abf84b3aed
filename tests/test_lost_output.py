"""Scripts whose output goes nowhere: a training goes on, and what only prints says that it failed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import run_forked

REPOSITORY = Path(__file__).resolve().parent.parent

TRAINING = "--model resnet8 --n-epochs 1 --limit-batches 1 --batch-size 16 --schedule --lr-drops --device cpu --run-name run"


@pytest.fixture
def full() -> Iterator[int]:
    """A descriptor of a disk without room."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def unread() -> Iterator[int]:
    """A descriptor of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def check_training(folder: Path, status: int, reason: str) -> None:
    assert status == 0
    log = (folder / "initial_train.txt").read_text()
    assert log.count(f"standard output cannot be written ({reason})") == 1
    assert log.splitlines()[-2].endswith(str(folder / "run" / "model_best.pt"))
    assert (folder / "run" / "summary.json").exists()


def test_training_goes_on_on_a_full_disk_and_its_log_says_so(full, tmp_path):
    ended = run_forked("initial_train.py", *TRAINING.split(), "--save-dir", str(tmp_path), streams={1: full})
    check_training(tmp_path, ended.status, "No space left on device")
    assert ended.errors.count("\n") == 1


def test_training_goes_on_without_its_reader_and_its_log_says_so(unread, tmp_path):
    words = [*TRAINING.split(), "--save-dir", str(tmp_path)]
    ended = run_forked("initial_train.py", *words, streams={1: unread, 2: unread})
    check_training(tmp_path, ended.status, "Broken pipe")


def test_training_goes_on_where_a_shell_has_closed_every_stream(tmp_path):
    command = f'"$0" {REPOSITORY / "initial_train.py"} {TRAINING} --save-dir {tmp_path} <&- >&- 2>&-'
    ended = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True, timeout=300)
    check_training(tmp_path, ended.returncode, "it is closed")
    assert ended.stderr == ""


def test_what_is_only_printed_is_a_failure_where_it_is_lost(trained_run, full, unread):
    words = f"--load-path {trained_run / 'model_best.pt'} --evaluate --limit-batches 1 --device cpu".split()
    ended = run_forked("initial_train.py", *words, streams={1: full})
    assert ended.status == 1
    assert ended.errors == "initial_train.py: error: standard output cannot be written: No space left on device\n"
    ended = run_forked("initial_train.py", *words, streams={1: unread})
    assert (ended.status, ended.errors) == (128 + signal.SIGPIPE, "")


def test_an_error_is_said_on_the_stream_that_is_left():
    ended = run_forked("initial_train.py", "--model", "resnet8", "--lr", "fast", streams={2: None})
    assert ended.status == 2
    assert ended.output.startswith("initial_train.py: error: --lr: 'fast'")
