"""`pip install .` brings the one package `filter_pruning`, which lives beside a project's own `models` and `utils`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import torch
import models.tiny, utils
import filter_pruning as fp
network, example = models.tiny.network().eval(), torch.rand(2, 3, 8, 8)
small = fp.prune(network, example, budget="macs=0.5", multiple=1)
fp.reconstruct(small, network, [torch.rand(8, 3, 8, 8)])
loss, logits, _ = fp.distil(small.train(), network, "kd", example=example)(example, torch.tensor([0, 1]))
loss.backward()
fp.save(small, "small.pt")
loaded = fp.load("small.pt", models.tiny.network)
fp.export(loaded, "small.py", example)
assert utils.MINE and torch.equal(loaded.eval()(example), small.eval()(example))
print(sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in network.parameters()))
"""
NETWORK = """
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 4))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    target = tmp_path_factory.mktemp("site-packages")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--target", str(target)]
    source = tmp_path_factory.mktemp("source")  # building leaves files in the folder that is built
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "filter_pruning", *("deploy", "distill", "models"),
                 *("prune", "quantize", "utils")):  # fmt: skip
        (source / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(source)], check=True, capture_output=True)
    return target


def test_it_installs_one_package(installed):
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"filter_pruning"}
    below = {path.name for path in (installed / "filter_pruning").iterdir() if path.is_dir()} - {"__pycache__"}
    assert below == {"deploy", "distill", "models", "prune", "quantize", "utils"}


def test_it_runs_beside_a_project_with_the_same_names(installed, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    (tmp_path / "models" / "tiny.py").write_text(NETWORK)
    (tmp_path / "utils.py").write_text("MINE = True\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("True\n", 0), ended.stderr
