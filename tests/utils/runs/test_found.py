"""Folders of runs in the place of files, and the newest run by name."""

import os

import pytest

from utils.errors import UserError
from utils.runs.found import SHIPPED, TRAINED, network_in, run_in


@pytest.fixture
def saves(tmp_path, monkeypatch):
    """Two complete runs, the newer one with a small network, and the newest, which is not complete."""
    monkeypatch.chdir(tmp_path)
    runs = {
        "dense": ("config.json", "summary.json", "model_best.pt"),
        "pruned": ("config.json", "summary.json", "model_best.pt", "model_compact.pt"),
        "begun": ("config.json", "model_best.pt"),
    }
    for age, (name, files) in enumerate(runs.items()):
        folder = tmp_path / "saves" / name
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).write_text("{}")
            os.utime(folder / file, (age, age))
    return tmp_path / "saves"


@pytest.mark.parametrize(
    ("text", "files", "found"),
    [
        ("saves/dense", TRAINED, "saves/dense/model_best.pt"),
        ("saves/dense/", SHIPPED, "saves/dense/model_best.pt"),
        ("saves/pruned", TRAINED, "saves/pruned/model_best.pt"),
        ("saves/pruned", SHIPPED, "saves/pruned/model_compact.pt"),
        ("latest", SHIPPED, "saves/pruned/model_compact.pt"),
        ("saves/latest", TRAINED, "saves/pruned/model_best.pt"),
        ("saves/pruned/model_best.pt", SHIPPED, "saves/pruned/model_best.pt"),
        ("elsewhere.pt", TRAINED, "elsewhere.pt"),
        ("saves", TRAINED, "saves"),
    ],
)
def test_which_file_is_meant(saves, text, files, found):
    assert network_in(text, files=files) == found


def test_the_run_that_was_worked_on_last(saves):
    assert run_in("latest") == run_in("saves/latest") == "saves/begun"
    assert run_in("saves/dense") == "saves/dense"


def test_what_is_called_latest_is_meant_itself(saves):
    (saves.parent / "latest").write_text("a file")
    assert network_in("latest", files=TRAINED) == run_in("latest") == "latest"


def test_no_network_is_taken_from_a_run_that_goes_on(saves):
    with pytest.raises(UserError, match=r"saves/begun: this run has not come to its end; name its model_best.pt"):
        network_in("saves/begun", files=TRAINED)


def test_there_is_none(saves):
    (saves / "dense" / "model_best.pt").unlink()
    with pytest.raises(UserError, match=r"saves/dense: the run in this folder has left no model_best.pt"):
        network_in("saves/dense", files=TRAINED)
    with pytest.raises(UserError, match=r"saves/dense/latest: there is no complete run in saves/dense"):
        network_in("saves/dense/latest", files=TRAINED)
