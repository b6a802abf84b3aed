"""TensorBoard's files, read back."""

import os

import pytest

from benchmarks.kill_test import curves
from utils.errors import UserError
from utils.runs.tensorboard import ScalarWriter


def test_every_number_is_in_the_file_at_once(tmp_path):
    writer = ScalarWriter(tmp_path / "log")
    writer.add({"train/loss": 0.5, "test/top1": 92.25}, step=0)
    writer.add({"train/loss": 0.25}, step=1)
    assert curves(tmp_path / "log") == {("train/loss", 0, 0.5): 1, ("test/top1", 0, 92.25): 1, ("train/loss", 1, 0.25): 1}


def test_tensorboard_itself_can_read_it(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    writer = ScalarWriter(tmp_path / "log")
    writer.add({"train/loss": 0.5}, step=7)
    writer.close()
    (path,) = (tmp_path / "log").iterdir()
    events = list(loader.LegacyEventFileLoader(str(path)).Load())
    assert [(event.step, event.summary.value[0].tag) for event in events[1:]] == [(7, "train/loss")]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "log").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*/log: "):
        ScalarWriter(tmp_path / "log")


def test_a_full_disk(tmp_path, monkeypatch):
    writer = ScalarWriter(tmp_path / "log")

    def fail(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*/log: No space left on device"):
        writer.add({"train/loss": 0.5}, step=0)
