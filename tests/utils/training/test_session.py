"""One run from its settings to its result: what is refused before anything is written, what a resumed one finds again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.errors import ParameterError, UserError
from utils.images.settings import DataSettings
from utils.runs.folder import CONFIG
from utils.runs.settings import RunSettings
from utils.training.objective import CrossEntropyObjective
from utils.training.session import Session
from utils.training.settings import SessionSettings, TrainingSettings


def settings(folder: Path, *, batch_size: int = 16, n_epochs: int = 1, **run) -> SessionSettings:
    run = {"save_dir": str(folder), "run_name": "run", "log_name": "log.txt", "device": "cpu", "seed": 3, **run}
    flags = {"batch_size": batch_size, "n_epochs": n_epochs, "load_path": "a.pt"}
    return SessionSettings(
        "train.py",
        DataSettings(batch_size=batch_size, limit_batches=2),
        TrainingSettings(0.1, n_epochs, schedule=(), lr_drops=(), ema=0.9, ships="trained", recalibrate_bn=4),
        RunSettings(**run),
        flags=flags,
        defaults=flags,
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 10))


def trained(session: Session) -> dict:
    session.announce("tiny")
    session.load_data()
    session.open({"--load-path": None})
    net = session.place(network())
    result = session.train(
        CrossEntropyObjective(net), network=net, describe=lambda net, kept: {"state_dict": net.state_dict(), "config": {}}
    )
    session.run.close()
    return result


class TestRefusals:
    @pytest.mark.parametrize(
        ("processes", "batch_size", "message"),
        [(1, 1, "batch_size 1: batch normalisation"), (3, 16, "batch_size 16: must be a multiple of the 3 processes")],
    )
    def test_of_a_batch_size(self, processes, batch_size, message, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        with pytest.raises(ParameterError, match=message):
            Session(settings(tmp_path, batch_size=batch_size))

    def test_of_a_device_that_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ParameterError, match="dev_idx 7: no CUDA device"):
            Session(settings(tmp_path, device="auto", dev_idx=7))
        with pytest.raises(ParameterError, match="device cuda: no CUDA device"):
            Session(settings(tmp_path, device="cuda"))

    def test_of_a_name_that_is_taken(self, tmp_path):
        (tmp_path / "run").mkdir()
        with pytest.raises(UserError, match="exists; choose another name"):
            Session(settings(tmp_path))

    def test_leave_nothing_behind(self, tmp_path):
        session = Session(settings(tmp_path, dry_run=True))
        session.load_data()
        session.print_plan({"network": network()}, ["loss: CE"])
        assert list(tmp_path.iterdir()) == []


def test_the_plan_is_what_the_settings_say(tmp_path):
    plan = Session(settings(tmp_path, n_epochs=7, amp=True, checkpoint_interval=3)).plan
    assert (plan.n_epochs, plan.amp, plan.checkpoint_interval, plan.recalibrate_bn_batches) == (7, True, 3, 4)
    assert (plan.ema_decay, plan.ships_average) == (0.9, False)


class TestResuming:
    def test_finds_state_and_files_again_and_goes_on(self, tmp_path):
        first = settings(tmp_path)
        first = replace(first, training=replace(first.training, recalibrate_bn=None))
        assert trained(Session(first))["last"]["epoch"] == 0
        longer = replace(first.training, n_epochs=2)
        resumed = Session(replace(first, training=longer, run=replace(first.run, resume=str(tmp_path / "run"))))
        assert not resumed.is_new and resumed.state["resume"]["epoch"] == 1
        assert resumed.recorded(CONFIG) == tmp_path / "run" / CONFIG and resumed.recorded("nothing.json") is None
        assert trained(resumed)["last"]["epoch"] == 1

    def test_of_a_new_run_there_is_nothing(self, tmp_path):
        session = Session(settings(tmp_path))
        assert session.is_new and session.recorded(CONFIG) is None
