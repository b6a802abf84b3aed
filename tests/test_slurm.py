"""A study on a real Slurm cluster of one node, which this starts, while its tasks are killed, requeued and out of time.

Skipped where Slurm and munge are not installed, or by users who may not start them.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.kill_test import differences
from utils.runs.folder import SUMMARY

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
STUDY = ("run_quantization_encode.sh", "--dataset", "digits", "--n-epochs", "3", "--limit-batches", "2", "--batch-size", "16")
VARIABLES = {"SEEDS": "1 2 3", "BITS": "3 4 5", "MODEL": "resnet20"}
RUNS = 1 + 3 + 9  # the teacher, a pruning for each seed, a quantization for each number of bits
DISTURBANCES, SECONDS_BETWEEN = ["requeued"] * 6 + ["out of time"] * 6 + ["killed"] * 2, 3.0
MOST_SECONDS = 600.0  # for one submission

pytestmark = [
    pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason="needs Debian's slurm-wlm and munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of Slurm are started by root"),
]


@pytest.fixture
def cluster():
    """The environment in which Slurm's commands speak to a cluster of one node. Its sockets take short names only."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        subprocess.run([ROOT / "tests" / "start_slurm.sh", folder], check=True)
        yield {"SLURM_CONF": str(folder / "slurm.conf")}
        for daemon in folder.glob("*.pid"):
            os.kill(int(daemon.read_text()), signal.SIGKILL)


def environment(tmp_path, **variables):
    places = {"SAVE_DIR": tmp_path / "saves", "REPORT_DIR": tmp_path / "report", "SLURM_DIR": tmp_path / "tasks"}
    threads = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return {**os.environ, **VARIABLES, **{name: str(path) for name, path in places.items()}, **threads, **variables}


def call(*command, env):
    return subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def queued(*states, env):
    return call("squeue", "--array", "--noheader", "--format=%F_%K", *(f"--states={state}" for state in states), env=env).split()


def trainings(saves):
    """The processes that train at this moment: their numbers, each with the name of its run."""
    found, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, stat = (path / "cmdline").read_bytes().decode().split("\0"), (path / "stat").read_text()
        except OSError:  # it has ended
            continue
        if "--run-name" in words and str(saves) in words:
            found[int(path.name)] = words[words.index("--run-name") + 1]
            parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
    return {number: name for number, name in found.items() if parents[number] not in found}  # what they start is no training


def start_requeued(env):
    """Slurm lets a requeued task wait for two minutes; here it may start at once."""
    for line in call("squeue", "--array", "--noheader", "--states=pending", "--format=%F_%K %r", env=env).splitlines():
        task, _, reason = line.partition(" ")
        if reason == "BeginTime":
            subprocess.run(["scontrol", "update", f"JobId={task}", "StartTime=now"], env=env, capture_output=True)


def disturb(kind, *, saves, env):
    """Does to a random task, or its process, what clusters do; says whether there was one."""
    victims = sorted(trainings(saves)) if kind == "killed" else queued("running", env=env)
    if not victims:
        return False
    victim = random.choice(victims)
    command = {
        "requeued": ["scontrol", "requeue"],
        "out of time": ["scancel", "--batch", "--signal=USR1"],
        "killed": ["kill", "-9"],
    }
    return subprocess.run([*command[kind], str(victim)], env=env, capture_output=True).returncode == 0


def wait_for_the_queue(pending, *, saves, env):
    """Until no task is left: disturbs one every few seconds, and looks all the time whether a run has two processes."""
    due, deadline = time.monotonic() + SECONDS_BETWEEN, time.monotonic() + MOST_SECONDS
    while queued(env=env):
        assert time.monotonic() < deadline, call("squeue", "--array", env=env)
        twice = [name for name, count in Counter(trainings(saves).values()).items() if count > 1]
        assert not twice
        if pending and time.monotonic() > due:
            if disturb(pending[-1], saves=saves, env=env):
                pending.pop()
            due = time.monotonic() + SECONDS_BETWEEN
        start_requeued(env)
        time.sleep(0.1)


def test_a_disturbed_study_ends_as_an_undisturbed_one(cluster, tmp_path):
    saves, untouched = tmp_path / "saves", tmp_path / "untouched"
    env = environment(tmp_path, **cluster)
    call("scripts/" + STUDY[0], *STUDY[1:], env={**env, "JOBS": "2"})
    saves.rename(untouched)
    shutil.rmtree(tmp_path / "report")

    pending, submissions = random.sample(DISTURBANCES, len(DISTURBANCES)), 0
    while not (tmp_path / "report").exists() or len(list(saves.glob(f"*/{SUMMARY}"))) < RUNS:
        submissions += 1
        assert submissions <= len(DISTURBANCES)
        call("scripts/slurm.sh", *STUDY, env=env)
        assert call("scripts/slurm.sh", *STUDY, env=env) == "all that is missing is queued\n"
        wait_for_the_queue(pending, saves=saves, env=env)

    runs = sorted(path.name for path in untouched.iterdir() if path.is_dir())
    assert len(runs) == RUNS
    different = [f"{name}: {problem}" for name in runs for problem in differences(untouched / name, saves / name)]
    print(f"{RUNS} runs, {dict(Counter(DISTURBANCES))}, {submissions} submissions, {len(different)} differences")
    assert not different and not pending
    assert not list(saves.glob("*/lease-*"))
    last = max(path.stat().st_mtime for path in saves.glob(f"*/{SUMMARY}"))
    assert (tmp_path / "report" / "report.html").stat().st_mtime > last
    assert len((tmp_path / "report" / "table.csv").read_text().splitlines()) > 1
