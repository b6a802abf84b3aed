"""One process at a time works on a run: on this machine, on others, where locks do nothing, and where it was suspended."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time

import pytest

from utils.errors import UserError
from utils.runs import lease
from utils.runs.lease import LAPSE_SECONDS, Lease
from utils.runs.run import Run
from utils.world import World

FORK = multiprocessing.get_context("fork")
ALIVE = r"--resume .*: this run is still alive in another process"


def without_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)


def age(path, seconds):
    """Makes a lease look as if it had last been renewed so long ago."""
    os.utime(path, (time.time() - seconds,) * 2)


def hold(folder, taken, done):
    Lease.take(folder)
    taken.set()
    done.wait()


@pytest.fixture
def holder(tmp_path):
    """Another process that works on the run in `tmp_path`."""
    taken, done = FORK.Event(), FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, taken, done))
    process.start()
    assert taken.wait(20)
    yield process
    process.kill()
    process.join()


def test_a_lease_says_who_holds_it_and_leaves_nothing_when_it_is_released(tmp_path):
    mine = Lease.take(tmp_path)
    said = json.loads((tmp_path / "lease-1").read_text())
    assert (said["process"], said["host"], said["locked"]) == (os.getpid(), os.uname().nodename, True)
    mine.check()
    mine.release()
    mine.release()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    Lease.take(tmp_path).release()


def test_a_live_process_keeps_the_run_and_is_named(tmp_path, holder):
    with pytest.raises(UserError, match=rf"{ALIVE} \(process {holder.pid} on {os.uname().nodename}\)"):
        Lease.take(tmp_path)
    age(tmp_path / "lease-1", 2 * LAPSE_SECONDS)  # suspended, as by SIGSTOP: the kernel knows that it lives
    with pytest.raises(UserError, match=ALIVE):
        Lease.take(tmp_path)


def test_what_was_killed_here_is_taken_over_at_once(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    mine = Lease.take(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lease-2", "lock"]
    mine.release()


def test_another_machine_has_its_time_to_renew(tmp_path):
    there = {"host": "there", "process": 7, "boot": "another", "locked": True, "token": "x"}
    (tmp_path / "lease-3").write_text(json.dumps(there))
    age(tmp_path / "lease-3", LAPSE_SECONDS - 20)
    with pytest.raises(UserError, match=rf"{ALIVE} \(process 7 on there\)"):
        Lease.take(tmp_path)
    age(tmp_path / "lease-3", LAPSE_SECONDS + 20)
    mine = Lease.take(tmp_path)
    assert (tmp_path / "lease-4").exists() and not (tmp_path / "lease-3").exists()
    mine.release()


def test_where_there_are_no_locks_the_lease_alone_decides(tmp_path, monkeypatch, holder):
    without_locks(monkeypatch)
    with pytest.raises(UserError, match=ALIVE):
        Lease.take(tmp_path)
    age(tmp_path / "lease-1", LAPSE_SECONDS + 20)
    mine = Lease.take(tmp_path)
    assert json.loads((tmp_path / "lease-2").read_text())["locked"] is False
    mine.release()


def test_a_lease_without_a_lock_is_not_taken_for_dead_because_the_lock_is_free(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        without_locks(patch)
        mine = Lease.take(tmp_path)
    with pytest.raises(UserError, match=ALIVE):
        Lease.take(tmp_path)
    mine.release()


def test_of_many_that_find_it_lapsed_one_takes_it(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    start, done, results = FORK.Event(), FORK.Event(), FORK.Queue()
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "lease-1").write_text("{}")
        age(folder / "lease-1", LAPSE_SECONDS + 20)
    processes = [FORK.Process(target=contend, args=(tmp_path, start, done, results)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    taken = [results.get(timeout=30) for _ in processes]
    done.set()
    for process in processes:
        process.join()
    assert [sum(row) for row in zip(*taken, strict=True)] == [1] * 5


def contend(folder, start, done, results):
    start.wait()
    leases = []
    for number in range(5):
        try:
            leases.append(Lease.take(folder / str(number)))
        except UserError:
            leases.append(None)
    results.put([lease is not None for lease in leases])
    done.wait()


def test_it_is_renewed_while_its_process_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.02)
    mine = Lease.take(tmp_path)
    age(tmp_path / "lease-1", LAPSE_SECONDS + 20)
    deadline = time.monotonic() + 20
    while time.time() - (tmp_path / "lease-1").stat().st_mtime > 60 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert time.time() - (tmp_path / "lease-1").stat().st_mtime < 60
    mine.release()


def test_a_fork_does_not_release_what_its_parent_holds(tmp_path):
    mine = Lease.take(tmp_path)
    child = FORK.Process(target=mine.release)
    child.start()
    child.join()
    mine.check()
    mine.release()


@pytest.mark.parametrize("finished", [False, True], ids=["and goes on", "and has ended"])
def test_a_run_that_was_taken_over_writes_nothing_more(finished, tmp_path, monkeypatch):
    without_locks(monkeypatch)
    run = Run.create(tmp_path, name="run", log_name="log.txt", config={}, world=World())
    run.save_json("kept_filters.json", {"by": "the first"})
    age(run.folder / "lease-1", LAPSE_SECONDS + 20)
    other = Run.reopen(run.folder, log_name="log.txt", world=World(), epochs=0)
    if finished:
        other.close()
        newest = Run.reopen(run.folder, log_name="log.txt", world=World(), epochs=0)  # under the number of the first
    taken_over = r"unheard of for 120 s, this run was taken over by process \d+ on .*; this process ends"
    for write in (
        lambda: run.save("model_last.pt", {"by": "the first"}),
        lambda: run.save_json("kept_filters.json", {"by": "the first, late"}),
        lambda: run.record({"epoch": 0, "split": "test"}),
    ):
        with pytest.raises(UserError, match=taken_over):
            write()
    assert not (run.folder / "model_last.pt").exists() and (run.folder / "metrics.jsonl").read_text() == ""
    assert json.loads((run.folder / "kept_filters.json").read_text()) == {"by": "the first"}
    run.close()
    holding = newest if finished else other
    holding.save_json("kept_filters.json", {"by": "the holder"})
    holding.close()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": "x", "host": "\\u001b[2J", "locked": 1, "boot": 3}'])
def test_what_cannot_be_understood_lives_until_it_lapses(content, tmp_path):
    (tmp_path / "lease-1").write_text(content)
    with pytest.raises(UserError, match=ALIVE) as refusal:
        Lease.take(tmp_path)
    assert str(refusal.value).isprintable()
    age(tmp_path / "lease-1", LAPSE_SECONDS + 20)
    Lease.take(tmp_path).release()


@pytest.mark.parametrize("name", ["lease-0", "lease-01", "lease-x", "lease-", "lease-" + "9" * 201])
def test_other_names_are_no_leases(name, tmp_path):
    (tmp_path / name).write_text("mine")
    Lease.take(tmp_path).release()
    assert (tmp_path / name).read_text() == "mine"


def test_a_lease_of_the_future_lapses_like_any_other(tmp_path):
    there = {"host": "there", "process": 7, "boot": "another", "locked": True, "token": "x"}
    path = tmp_path / "lease-1000000000"
    path.write_text(json.dumps(there))
    age(path, -(10**9))
    with pytest.raises(UserError, match=rf"{ALIVE} \(process 7 on there\); if that one is gone, the run is free 120 s after"):
        Lease.take(tmp_path)
    assert abs(path.stat().st_mtime - time.time()) < 60
    age(path, LAPSE_SECONDS + 20)
    mine = Lease.take(tmp_path)
    assert [entry.name for entry in tmp_path.glob("lease-*")] == ["lease-1000000001"]
    mine.release()
