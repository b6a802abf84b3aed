"""Nothing heavy is imported before flags are parsed: help and a mistyped flag answer at once, and names are known beforehand."""

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.exporters import EXPORTERS
from deploy.runtimes import RUNTIMES
from deploy.settings import FORMAT_NAMES, RUNTIME_NAMES
from quantize.codebook import LAYER_KINDS
from quantize.settings import QUAN_MODES
from reporting.naming import PICTURE_NAMES, README_PICTURES
from reporting.pictures import PICTURES
from utils.images.datasets import DATASETS
from utils.images.settings import DATASET_NAMES

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("initial_train.py", "pruning.py", "quantize_encode.py", "export.py", "predict.py", "report.py")
HEAVY = ("torch", "torchvision", "numpy", "matplotlib", "timm", "onnx", "onnxruntime", "sklearn", "PIL", "tensorboardX")
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end.code, *sorted(sys.modules.keys() & set({heavy!r})))
"""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("flag", "status"), [("--help", 0), ("--version", 0), ("--mistyped", 2)])
def test_flags_are_parsed_before_anything_heavy_is_imported(script, flag, status):
    command = [sys.executable, "-c", RUN.format(heavy=HEAVY), script, flag]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == str(status)
    assert (flag in ended.stderr) == bool(status)


def test_the_test_sees_what_is_imported(tmp_path):
    (tmp_path / "script.py").write_text("import numpy\nraise SystemExit(0)\n")
    command = [sys.executable, "-c", RUN.format(heavy=HEAVY), "script.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split() == ["0", "numpy"]


def test_the_names_that_flags_offer_are_those_that_there_are():
    assert tuple(DATASETS) == DATASET_NAMES
    assert tuple(RUNTIMES) == RUNTIME_NAMES
    assert tuple(EXPORTERS) == FORMAT_NAMES
    assert tuple(LAYER_KINDS) == QUAN_MODES
    assert tuple(name for name, *_ in PICTURES) == PICTURE_NAMES
    assert set(README_PICTURES) < set(PICTURE_NAMES)
