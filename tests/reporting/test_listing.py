"""report.py --list: the runs of a folder, the newest first."""

import json
import os
import shutil

import pytest

from reporting.listing import listing
from utils.errors import UserError


@pytest.fixture
def saves(tmp_path, trained_run):
    """A finished run, an older one that was stopped after an epoch of two, and a damaged one, older still."""
    saves = tmp_path / "saves"
    for name in ("whole", "cut", "damaged"):
        shutil.copytree(trained_run, saves / name)
        for lease in (saves / name).glob("lease-*"):
            lease.unlink()
    (saves / "cut" / "summary.json").unlink()
    lines = (saves / "cut" / "metrics.jsonl").read_text().splitlines(keepends=True)
    first = [line for line in lines if json.loads(line)["epoch"] == 0]
    (saves / "cut" / "metrics.jsonl").write_text("".join(first))
    (saves / "damaged" / "config.json").write_text("[]")
    for age, name in ((3, "whole"), (2, "cut"), (1, "damaged")):
        for path in (saves / name).glob("*.json*"):
            os.utime(path, (age, age))
    return saves


def test_the_newest_comes_first_with_its_accuracy_and_state(saves):
    head, whole, cut, damaged = listing([saves], width=200).splitlines()
    assert head.split() == ["run", "network", "method", "top-1", "state"]
    last = json.loads((saves / "whole" / "summary.json").read_text())["last"]["top1"]
    assert whole.split() == ["whole", "ResNet-8", "unpruned", f"{last:.2f}", "complete"]
    assert cut.startswith("cut ") and cut.endswith("stopped, 1 of 2 epochs")
    assert damaged.startswith("damaged ") and "config.json is damaged" in damaged


def test_a_run_that_somebody_works_on_is_running(saves):
    (saves / "cut" / "lease-7").write_text("{}")
    assert "running, 1 of 2 epochs" in listing([saves / "cut"])


def test_methods_give_way_to_the_width(saves):
    shutil.rmtree(saves / "damaged")
    path = saves / "whole" / "config.json"
    config = json.loads(path.read_text())
    config["script"], config["flags"]["prune_mode"], config["flags"]["prune_rates"] = "pruning.py", "x" * 60, [0.5]
    path.write_text(json.dumps(config))
    assert max(map(len, listing([saves], width=80).splitlines())) == 80


def test_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match="no run in there"):
        listing([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        listing([tmp_path / "saves"])
