"""What the tests share: the entry scripts run inside this process, and a trained network to start from."""

import contextlib
import importlib
import io
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis.database import DirectoryBasedExampleDatabase
from PIL import Image

from utils import cli, profile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / ".hypothesis" / "examples"
TEACHER_FLAGS = "--model resnet8 --n-epochs 2 --limit-batches 2 --batch-size 32 --lr 0.05 --schedule --lr-drops --device cpu"

FEW = hypothesis.settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
MANY = {"max_examples": 2000, "derandomize": False, "database": DirectoryBasedExampleDatabase(EXAMPLES), "print_blob": True}
hypothesis.settings.register_profile("few", FEW)
hypothesis.settings.register_profile("thorough", FEW, **MANY)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="thousands of random examples, and the tests marked as thorough")
    parser.addoption("--seed", type=int, help="with --thorough, the seed of its examples (default: another one each time)")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is imported, which may ask for more or fewer examples than the profile has."""
    hypothesis.settings.load_profile("thorough" if config.option.thorough else "few")
    if config.option.thorough and config.option.seed is None:
        config.option.seed = secrets.randbits(32)  # which the processes of xdist get as well


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"thorough: --seed {config.option.seed}, failing examples stay in {EXAMPLES}" if config.option.thorough else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.thorough:
        for item in items:
            if hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
                hypothesis.seed(config.option.seed)(getattr(item.obj, "__func__", item.obj))
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


class Ended(NamedTuple):
    """How a script ended, and what it printed."""

    status: int
    output: str
    errors: str


def run_main(script: str, *words: str) -> Ended:
    """Runs an entry script, such as "pruning", in this process, as its command line would."""
    module = importlib.import_module(script)
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [f"{script}.py", *words]),
        mock.patch.multiple(profile, MIN_RUN_SECONDS=0.0, MIN_ROUNDS=2),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            cli.run_script(module.get_args_parser, module.main, words)
        except SystemExit as end:
            status = end.code
    return Ended(status, output.getvalue(), errors.getvalue())


@pytest.fixture(scope="session")
def run_script() -> Callable[..., Ended]:
    return run_main


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums in one order, and nothing that a forked process would wait for."""
    torch.set_num_threads(1)
    torch.ones(1, requires_grad=True).sum().backward()  # after tensors without data it would start threads


@pytest.fixture(scope="session", autouse=True)
def _repository_stays_clean() -> Iterator[None]:
    """Fails if a test wrote where users keep their runs and data."""
    before = _user_files()
    yield
    assert _user_files() == before


def _user_files() -> set[Path]:
    return {path for folder in ("saves", "data", "report") for path in (REPOSITORY / folder).glob("*")}


def write_images(folder: Path, *, sizes: Sequence[int], seed: int = 0, suffix: str = ".png") -> None:
    """One square image of random pixels for each of `sizes`."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for index, size in enumerate(sizes):
        pixels = random.integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}{suffix}")


@pytest.fixture(scope="session")
def image_writer() -> Callable[..., None]:
    return write_images


@pytest.fixture(scope="session")
def mixed_size_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `--dataset folder` whose images differ in size, so that they are streamed."""
    folder = tmp_path_factory.mktemp("images")
    for number, place in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        write_images(folder / place, sizes=(40, 64, 90), seed=number)
    return folder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of initial_train.py: ResNet-8, a few steps on digits."""
    save_dir = tmp_path_factory.mktemp("trained")
    ended = run_main("initial_train", *TEACHER_FLAGS.split(), "--save-dir", str(save_dir), "--run-name", "teacher")
    assert ended.status == 0, ended.errors
    return save_dir / "teacher"
