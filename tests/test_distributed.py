"""Two processes started by torchrun, on one machine and with gloo, do what one does; one that fails ends both."""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import distributed_worker as worker
import pytest
import torch

from models import MODELS
from utils import distributed, profile
from utils.checkpoints import load_checkpoint
from utils.errors import UserError
from utils.world import World

REPOSITORY = Path(__file__).resolve().parent.parent
PROCESSES = 2


def torchrun(*command: str, seconds: float = 600) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    return subprocess.run(
        [*launcher, *command], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds, check=False
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of one launch of every scenario, with what each process found under `rank<n>.pt`."""
    folder = tmp_path_factory.mktemp("together")
    result = torchrun(worker.__file__, str(folder), "all")
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def found(together):
    return [torch.load(together / f"rank{rank}.pt") for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the same trainings in this one process."""
    folder = tmp_path_factory.mktemp("alone")
    worker.write_teacher(folder / "no-norm.pt", "no-norm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "MIN_RUN_SECONDS", 0.001)
        worker.run_no_norm(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def added_networks():
    with pytest.MonkeyPatch.context() as patch:
        for name, build in worker.NETWORKS.items():
            patch.setitem(MODELS, name, build)
        yield


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "images_per_second")} for line in lines]


@pytest.mark.parametrize("scenario", ["gradients_of_a_step", "scores_and_choices"])
def test_uneven_shares_give_what_one_process_gives(found, scenario):
    expected = worker.SCENARIOS[scenario](World())
    for of_process in found:
        torch.testing.assert_close(of_process[scenario], expected, rtol=1e-4, atol=1e-6)


def test_scores_and_choices_are_the_same_bits_everywhere(found):
    torch.testing.assert_close(found[0]["scores_and_choices"], found[1]["scores_and_choices"], rtol=0, atol=0)


def test_parameters_of_student_and_afd_are_synchronised(found):
    of_main, of_other = (process["parameters_after_afd"] for process in found)
    assert any(name.startswith("distillers.afd") for name in of_main)
    torch.testing.assert_close(of_main, of_other, rtol=0, atol=0)


def test_recalibrated_statistics_are_the_same_bits_everywhere(found):
    of_main, of_other = (process["recalibrated_statistics"] for process in found)
    torch.testing.assert_close(of_main, of_other, rtol=0, atol=0)
    expected = worker.recalibrated_statistics(World())
    for name, statistic in expected.items():
        # a mean of variances misses how far the means of the parts lie apart
        torch.testing.assert_close(of_main[name], statistic, rtol=0.02, atol=1e-6 if "var" not in name else 0.01)


def test_all_have_what_the_main_process_computed(found):
    assert [process["computed_by_the_main_process"]["rank"].item() for process in found] == [0, 0]


def test_every_test_image_counts_once(found):
    seen = [process["tested_images"]["seen"].tolist() for process in found]
    assert sorted([*seen[0], *seen[1]]) == list(range(21)) and all(seen)
    expected = worker.tested_images(World())
    for process in found:
        torch.testing.assert_close(process["tested_images"]["scores"], expected["scores"])
        for name in ("hits", "digest"):
            assert torch.equal(process["tested_images"][name], expected[name])


@pytest.mark.parametrize("run", ["nggm-at", "soft"])
def test_a_training_ends_as_in_one_process(together, alone, run):
    of_many, of_one = (folder / "saves" / run for folder in (together, alone))
    assert (of_many / "kept_filters.json").read_text() == (of_one / "kept_filters.json").read_text()
    for line, expected in zip(metrics(of_many), metrics(of_one), strict=True):
        assert line.pop("split") == expected.pop("split")
        assert line == pytest.approx(expected, rel=1e-3)
    states = [load_checkpoint(folder / "model_last.pt")["state_dict"] for folder in (of_many, of_one)]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)


def test_a_signal_to_one_process_stops_all_and_resuming_ends_bit_for_bit(together):
    whole, resumed = (together / "saves" / name for name in ("whole", "resumed"))
    for name in ("model_last.pt", "model_best.pt"):
        first, second = (load_checkpoint(folder / name) for folder in (whole, resumed))
        torch.testing.assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)
    assert metrics(whole) == metrics(resumed)


def test_only_the_main_process_writes(found, together):
    assert found[0]["written"] and not found[1]["written"]
    assert [line["epoch"] for line in metrics(together / "saves" / "whole")] == [0, 0, 1, 1]


def test_a_dead_process_ends_the_others(tmp_path):
    began = time.monotonic()
    result = torchrun(worker.__file__, str(tmp_path), "die", seconds=240)
    assert result.returncode != 0 and time.monotonic() - began < 200
    assert "exitcode  : 7" in result.stderr
    assert 'worker.py", line' not in result.stderr  # what the survivor met is no traceback


def test_a_batch_that_the_processes_do_not_divide_is_one_line_from_the_main_one(tmp_path):
    flags = ["--model", "resnet8", "--batch-size", "33", "--device", "cpu", "--save-dir", str(tmp_path / "saves")]
    result = torchrun("initial_train.py", *flags)
    said = [line for line in result.stderr.splitlines() if line.startswith("initial_train.py: ")]
    assert result.returncode != 0
    assert said == ["initial_train.py: error: --batch-size 33: must be a multiple of the 2 processes that torchrun started"]
    assert not (tmp_path / "saves").exists()


def test_a_world_that_cannot_form_is_bad_input(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    with pytest.raises(UserError, match="2 processes could not form a group"):
        distributed.join(World(rank=0, size=2), worker.CPU)
