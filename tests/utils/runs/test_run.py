"""The folder of a run: made whole, never shared, cut back to what its state knows."""

import fcntl
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.kill_test import curves
from utils import checkpoints, files
from utils.errors import UserError
from utils.runs.folder import BEST, LAST, PREVIOUS
from utils.runs.metrics_file import read_metrics
from utils.runs.run import Run
from utils.runs.state import read_state
from utils.world import World

STATE = {"epoch": 0, "batch": 0, "best": None, "last": None, "sums": [{}]}
STATE |= {"objective": {}, "optimizer": {}, "hooks": {}, "random": []}
FORK = multiprocessing.get_context("fork")


def create(save_dir: Path, *, name: str | None = "run") -> Run:
    return Run.create(save_dir, name=name, log_name="log.txt", config={"script": "train.py", "flags": {"lr": 0.1}}, world=World())


def checkpoint(epoch: int) -> dict:
    return {"format": 1, "weight": torch.full((3,), float(epoch)), "resume": {**STATE, "epoch": epoch}}


def line(epoch: int, split: str = "test", **values) -> dict:
    return {"epoch": epoch, "split": split, "loss": 0.5, "seconds": 1.5, **values}


class TestCreate:
    def test_leaves_config_from_the_first_moment(self, tmp_path):
        create(tmp_path).close()
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["flags"] == {"lr": 0.1}
        assert config["versions"]["torch"] == torch.__version__

    def test_names_by_time_are_unique(self, tmp_path):
        before = int(time.time())
        names = {create(tmp_path, name=None).folder.name for _ in range(5)}
        assert len(names) == 5
        assert all(before <= int(name) <= time.time() + 5 for name in names)

    def test_processes_that_start_at_once_get_folders_of_their_own(self, tmp_path):
        start = FORK.Event()
        processes = [FORK.Process(target=_create_at, args=(start, tmp_path, number)) for number in range(6)]
        for process in processes:
            process.start()
        start.set()
        for process in processes:
            process.join()
        folders = [path for path in tmp_path.iterdir() if path.is_dir()]
        assert len(folders) == 6
        assert sorted((folder / "mine").read_text() for folder in folders) == sorted(map(str, range(6)))

    def test_a_taken_name_is_refused_and_left_alone(self, tmp_path):
        create(tmp_path).record(line(0))
        with pytest.raises(UserError, match=r"--run-name run: .*/run exists"):
            create(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert len(read_metrics(tmp_path / "run")) == 1

    @pytest.mark.parametrize("step", ["fsync", "rename"])
    def test_a_full_disk_leaves_nothing(self, step, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, step, fail)
        with pytest.raises(UserError, match="No space left on device"):
            create(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_clears_what_a_killed_one_left_long_ago(self, tmp_path):
        for name, age in (("old", 7200), ("new", 0)):
            folder = tmp_path / f"{files.TEMPORARY_PREFIX}run-{name}"
            folder.mkdir()
            os.utime(folder, (time.time() - age,) * 2)
        create(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"{files.TEMPORARY_PREFIX}run-new", "run"]

    def test_only_the_main_process_writes(self, tmp_path):
        run = Run(tmp_path / "run", log_path=tmp_path / "log.txt", world=World(rank=1, size=2, local_rank=1))
        run._open(None, epochs=0)
        run.log("hello")
        run.record(line(0))
        run.save(LAST, checkpoint(1))
        run.save_json("summary.json", {})
        run.close()
        assert list(tmp_path.iterdir()) == []


def _create_at(start, save_dir: Path, number: int) -> None:
    start.wait()
    (create(save_dir, name=None).folder / "mine").write_text(str(number))


class TestLock:
    def test_a_live_run_is_not_reopened(self, tmp_path):
        create(tmp_path).close()
        locked, done = FORK.Event(), FORK.Event()
        holder = FORK.Process(target=_hold, args=(tmp_path / "run", locked, done))
        holder.start()
        locked.wait()
        with pytest.raises(UserError, match=r"--resume .*/run: this run is still alive in another process"):
            Run.reopen(tmp_path / "run", log_name="log.txt", world=World(), epochs=0)
        done.set()
        holder.join()
        Run.reopen(tmp_path / "run", log_name="log.txt", world=World(), epochs=0).close()

    def test_helpers_that_outlive_a_run_do_not_hold_it(self, tmp_path):
        run, done = create(tmp_path), FORK.Event()
        helper = FORK.Process(target=done.wait)  # as a DataLoader's worker, with every open file of this process
        helper.start()
        run.close()
        Run.reopen(tmp_path / "run", log_name="log.txt", world=World(), epochs=0).close()
        done.set()
        helper.join()

    def test_opening_it_empties_nothing(self, tmp_path):
        create(tmp_path).close()
        (tmp_path / "mine").write_text("kept")
        (tmp_path / "run" / "lock").unlink()
        os.link(tmp_path / "mine", tmp_path / "run" / "lock")
        Run.reopen(tmp_path / "run", log_name="log.txt", world=World(), epochs=0).close()
        assert (tmp_path / "mine").read_text() == "kept"

    def test_folder_that_is_no_run(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"cannot lock .*/file/lock: Not a directory"):
            Run.reopen(tmp_path / "file", log_name="log.txt", world=World(), epochs=0)


def _hold(folder: Path, locked, done) -> None:
    with open(folder / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        locked.set()
        done.wait()


class TestReopen:
    def test_cuts_back_what_the_state_does_not_know(self, tmp_path):
        run = create(tmp_path)
        for epoch in range(3):
            run.record(line(epoch, "train"))
            run.record(line(epoch))
        run.close()
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.write('{"epoch": 3, "split": "tr')  # a crash in the middle of a line
        (run.folder / f"{files.TEMPORARY_PREFIX}model_last.pt-abc").write_bytes(b"half")
        run = Run.reopen(run.folder, log_name="log.txt", world=World(), epochs=2)
        run.record(line(2, "train"))
        run.close()
        expected = [(0, "train"), (0, "test"), (1, "train"), (1, "test"), (2, "train")]
        assert [(record["epoch"], record["split"]) for record in read_metrics(run.folder)] == expected
        steps = [(step, tag) for tag, step, _ in curves(run.folder / "log").elements() if tag.endswith("loss")]
        assert sorted(steps) == [(0, "test/loss"), (0, "train/loss"), (1, "test/loss"), (1, "train/loss"), (2, "train/loss")]
        assert not list(run.folder.glob(f"{files.TEMPORARY_PREFIX}*"))

    def test_seconds_are_those_of_all_epochs(self, tmp_path):
        run = create(tmp_path)
        run.record(line(0, "train"))
        run.record(line(0))
        run.close()
        assert Run.reopen(run.folder, log_name="log.txt", world=World(), epochs=1).seconds() == 3.0

    def test_names_the_command_that_goes_on(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sys.argv", ["pruning.py", "--lr", "1"])
        python = sys.executable if shutil.which(Path(sys.executable).name) != sys.executable else Path(sys.executable).name
        monkeypatch.chdir(tmp_path)  # from where that Python has no shorter name
        folder = tmp_path / "a run"
        single, many = (Run(folder, log_path=tmp_path, world=World(size=size)) for size in (1, 4))
        assert single.resume_command() == f"{python} pruning.py --resume '{folder}'"
        assert many.resume_command() == f"torchrun --nproc_per_node=4 pruning.py --resume '{folder}'"
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert many.resume_command() == f"torchrun --nnodes=2 --nproc_per_node=2 pruning.py --resume '{folder}'"


class TestStates:
    def test_last_and_previous(self, tmp_path):
        run = create(tmp_path)
        for epoch in (1, 2, 3):
            run.save(LAST, checkpoint(epoch))
        assert [checkpoints.load_checkpoint(run.folder / name)["resume"]["epoch"] for name in (LAST, PREVIOUS)] == [3, 2]
        assert read_state(run.folder)[0]["resume"]["epoch"] == 3

    def test_without_hard_links(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(95, os.strerror(95))

        monkeypatch.setattr(os, "link", refuse)
        self.test_last_and_previous(tmp_path)

    def test_after_a_kill_between_the_two(self, tmp_path):
        run = create(tmp_path)
        run.save(LAST, checkpoint(1))
        os.link(run.folder / LAST, run.folder / PREVIOUS)  # as far as it had come
        run.save(LAST, checkpoint(2))
        assert [checkpoints.load_checkpoint(run.folder / name)["resume"]["epoch"] for name in (LAST, PREVIOUS)] == [2, 1]
        assert not list(run.folder.glob(f"{files.TEMPORARY_PREFIX}*"))

    def test_best_has_no_predecessor(self, tmp_path):
        run = create(tmp_path)
        run.save(BEST, checkpoint(1))
        run.save(BEST, checkpoint(2))
        assert not (run.folder / PREVIOUS).exists()

    def test_damaged_last_state_falls_back_and_is_not_kept(self, tmp_path):
        run = create(tmp_path)
        for epoch in (1, 2):
            run.save(LAST, checkpoint(epoch))
        run.close()
        (run.folder / LAST).write_bytes(b"damaged")
        state, message = read_state(run.folder)
        assert state["resume"]["epoch"] == 1
        assert "model_last.pt" in message
        assert "going on from the state before it, model_previous.pt" in message
        resumed = Run.reopen(run.folder, log_name="log.txt", world=World(), epochs=0)
        resumed.save(LAST, checkpoint(2))
        assert [checkpoints.load_checkpoint(run.folder / name)["resume"]["epoch"] for name in (LAST, PREVIOUS)] == [2, 1]

    def test_a_run_without_any_state_starts_anew(self, tmp_path):
        assert read_state(create(tmp_path).folder) == (None, None)

    def test_a_network_is_no_state(self, tmp_path):
        run = create(tmp_path)
        checkpoints.save_checkpoint(run.folder / LAST, {"format": 1, "state_dict": {}})
        with pytest.raises(UserError, match=r"--resume .*model_last\.pt: holds a network, but no state of a training"):
            read_state(run.folder)

    def test_all_damaged(self, tmp_path):
        run = create(tmp_path)
        for name in (LAST, PREVIOUS):
            (run.folder / name).write_bytes(b"damaged")
        with pytest.raises(UserError, match=r"model_last\.pt.*model_previous\.pt"):
            read_state(run.folder)


class TestFullDisk:
    """Every file of a run meets a full disk with one clear error, and the old files stay."""

    @pytest.mark.parametrize(
        "write",
        [
            lambda run: run.save(LAST, checkpoint(9)),
            lambda run: run.save(BEST, checkpoint(9)),
            lambda run: run.save_json("summary.json", {"new": True}),
            lambda run: run.record(line(9)),
            lambda run: run.log("a message"),
        ],
        ids=["last", "best", "summary", "metrics", "log"],
    )
    def test_refuses_in_one_line(self, write, tmp_path, monkeypatch):
        run = create(tmp_path)
        run.save(LAST, checkpoint(1))
        run.save(LAST, checkpoint(2))
        run.save(BEST, checkpoint(2))
        before = {name: checkpoints.digest(checkpoints.load_checkpoint(run.folder / name)) for name in (LAST, BEST)}

        def fail(*_):
            raise OSError(28, os.strerror(28))

        for step in ("fsync", "write", "link"):
            monkeypatch.setattr(os, step, fail)
        with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
            write(run)
        monkeypatch.undo()
        assert {name: checkpoints.digest(checkpoints.load_checkpoint(run.folder / name)) for name in (LAST, BEST)} == before
        assert not list(run.folder.glob(f"{files.TEMPORARY_PREFIX}*"))

    def test_tensorboard(self, tmp_path, monkeypatch):
        run = create(tmp_path)
        monkeypatch.setattr(run._writer._events, "flush", lambda: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        with pytest.raises(UserError, match=r"cannot write .*/log: No space left on device"):
            run.record(line(0))

    def test_a_folder_that_is_gone(self, tmp_path):
        run = create(tmp_path)
        shutil.rmtree(run.folder)
        with pytest.raises(UserError, match="No such file or directory"):
            run.save(LAST, checkpoint(1))


def test_the_shared_log_names_run_and_time(tmp_path, capsys):
    first, second = create(tmp_path, name="first"), create(tmp_path, name="second")
    first.log("one\ntwo")
    second.warn("three")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [text.split(" ", 2)[2] for text in lines] == ["first one", "first two", "second WARNING: three"]
    assert capsys.readouterr().out == "one\ntwo\nWARNING: three\n"
