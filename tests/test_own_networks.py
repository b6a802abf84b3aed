"""Networks of others through the entry scripts; code of a file runs because somebody types its name, and for no other reason."""

import json
import shutil
from pathlib import Path

import pytest

from models import build_model
from models.network_file import load_network
from utils.files import load_checkpoint

SHORT = ["--n-epochs", "1", "--limit-batches", "2", "--batch-size", "16", "--device", "cpu", "--schedule", "--lr-drops"]
NETWORKS = (Path(__file__).parent / "models" / "networks_of_others.py").read_text()


def write_file(folder: Path) -> Path:
    """A user's file that says when it runs."""
    path = folder / "nets.py"
    path.write_text(f"{NETWORKS}\nopen({str(folder / 'has_run')!r}, 'w').close()\n")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_script) -> Path:
    """A run of a network in a file that is no longer what it was: it would tell if it ran."""
    folder = tmp_path_factory.mktemp("own")
    path = write_file(folder)
    ended = run_script("initial_train", "--model", f"{path}:small", *SHORT, "--save-dir", str(folder), "--run-name", "teacher")
    assert ended.status == 0, ended.errors
    assert (folder / "has_run").exists()
    return folder / "teacher"


@pytest.fixture
def strange(trained, tmp_path) -> tuple[Path, Path]:
    """The run as somebody else's who put another file in its place, and the mark that this leaves if it runs."""
    marker = tmp_path / "marker"
    path = tmp_path / "strange.py"
    path.write_text(f"open({str(marker)!r}, 'w').close()\ndef small(num_classes): pass\n")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = json.loads((run / "config.json").read_text())
    config["flags"]["model"] = f"{path}:small"
    (run / "config.json").write_text(json.dumps(config))
    return run, marker


def test_the_checkpoint_carries_the_name(trained):
    name = load_checkpoint(trained / "model_best.pt")["model"]
    assert name == f"{trained.parent / 'nets.py'}:small"
    assert json.loads((trained / "summary.json").read_text())["model"] == name
    file = load_network(trained / "model_best.pt", flag="--load-path", model=name)
    assert list(file.network.state_dict()) == list(build_model(name, num_classes=10).state_dict())


class TestCodeNeverRuns:
    def test_because_a_checkpoint_names_it(self, trained, run_script):
        for script in ("initial_train", "quantize_encode"):
            ended = run_script(script, "--evaluate", "--load-path", str(trained / "model_best.pt"), *SHORT)
            assert ended.status == 2
            assert "never runs because a file names it; say where yours is, --model FILE.py:small" in ended.errors
            assert ended.errors.count("\n") == 1

    def test_because_a_run_is_resumed(self, strange, run_script):
        run, marker = strange
        ended = run_script("initial_train", "--resume", str(run))
        assert ended.status == 2
        assert "give --model again" in ended.errors
        assert not marker.exists()

    def test_because_attention_is_drawn(self, strange, run_script):
        run, marker = strange
        config = json.loads((run / "config.json").read_text())
        names = {"t_model": config["flags"]["model"], "t_path": str(run / "model_best.pt"), "hap_ts": 1}
        (run / "config.json").write_text(json.dumps({**config, "script": "pruning.py", "flags": {**config["flags"], **names}}))
        ended = run_script("report", str(run), "--attention", str(run), "--output", str(run / "report"))
        assert ended.status == 2
        assert "--s-model" in ended.errors
        assert not marker.exists()


def test_with_its_name_it_is_evaluated_and_resumed(trained, run_script):
    name = f"{trained.parent / 'nets.py'}:small"
    ended = run_script("initial_train", "--evaluate", "--load-path", str(trained / "model_best.pt"), "--model", name, *SHORT)
    assert ended.status == 0, ended.errors
    ended = run_script("initial_train", "--resume", str(trained), "--model", name, "--n-epochs", "2")
    assert ended.status == 0, ended.errors
    assert "epoch 2/2" in ended.output


def test_images_of_a_size_that_a_network_refuses_are_one_line(tmp_path, run_script):
    words = ("--model", "torchvision/vit_b_16", *SHORT, "--dry-run", "--save-dir", str(tmp_path))
    ended = run_script("initial_train", *words)
    assert ended.status == 2
    assert "--model torchvision/vit_b_16: cannot take 32x32 images" in ended.errors
    assert ended.errors.count("\n") == 1


def test_a_network_with_other_classes_than_asked_for_is_refused(tmp_path, run_script):
    path = tmp_path / "nets.py"
    path.write_text(NETWORKS + "\ndef fixed(num_classes):\n    return Small(4)\n")
    ended = run_script("initial_train", "--model", f"{path}:fixed", *SHORT, "--dry-run", "--save-dir", str(tmp_path))
    assert ended.status == 2
    assert "must return logits of shape" in ended.errors
