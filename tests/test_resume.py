"""Runs that are killed, stopped or damaged go on as if nothing had happened.

The processes are forked from this one by the functions of benchmarks/kill_test.py, which kills at random.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.kill_test import RECIPES, RUN, Recipe, differences, go_on, moments_of, start, wait
from utils.checkpoints import load_checkpoint, save_checkpoint

BY_NAME = {recipe.name: recipe for recipe in RECIPES}
HARD, SOFT, QUANTIZED = (BY_NAME[name] for name in ("hard + AFD", "soft + HAP", "quantization"))
DROPOUT = Recipe(
    "dropout",
    "initial_train",
    "--model alexnet --run-name run --n-epochs 3 --limit-batches 2 --batch-size 16 --schedule --lr-drops",
)
RECALIBRATED = Recipe(
    "recalibrated",
    "pruning",
    "--t-path {teacher} --s-copy-t --prune-mode filter-l2 --prune-rates 0.6 --soft-prune --prune-interval 2 --recalibrate-bn 1 "
    "--run-name run --n-epochs 3 --limit-batches 2 --batch-size 16 --schedule --lr-drops",
)
GRADUAL = Recipe(
    "gradual",
    "pruning",
    "--t-path {teacher} --s-copy-t --prune-mode filter-gm --prune-rates 0.4 --prune-steps 3 --reconstruct 16 --distill hap "
    "--run-name run --n-epochs 4 --limit-batches 2 --batch-size 16 --schedule --lr-drops",
)
GRADUAL_MASKED = GRADUAL._replace(name="gradual-masked", flags=f"{GRADUAL.flags} --train-form masked")
INT8 = Recipe(
    "int8",
    "quantize_encode",
    "--load-path {teacher} --quan-mode int8 --t-path {teacher} --distill hap --lr 0.01 "
    "--run-name run --n-epochs 3 --limit-batches 2 --batch-size 16",
)
FOLDER_FLAGS = (
    "--model resnet8 --dataset folder --run-name run --n-epochs 3 --limit-batches 2 --batch-size 2 --schedule --lr-drops"
)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, trained_run) -> Callable[[Recipe], Path]:
    """The folder in which a recipe ran to its end undisturbed."""
    folders: dict[str, Path] = {}

    def folder_of(recipe: Recipe) -> Path:
        if recipe.name not in folders:
            folder = tmp_path_factory.mktemp("untouched")
            assert begin(recipe, folder, trained_run) == 0, output(folder)
            folders[recipe.name] = folder
        return folders[recipe.name]

    return folder_of


def words_of(recipe: Recipe, trained_run: Path) -> list[str]:
    return recipe.words(trained_run / "model_best.pt")


def begin(recipe: Recipe, folder: Path, trained_run: Path, **kill) -> int:
    return wait(start(recipe.script, words_of(recipe, trained_run), folder=folder, **kill))


def finish(recipe: Recipe, folder: Path, trained_run: Path) -> int:
    return wait(go_on(recipe.script, words_of(recipe, trained_run), folder=folder))


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def nth(folder: Path, name: str, count: int) -> int:
    """The number of the `count`-th moment of that name in the run of `folder`."""
    return [index for index, moment in enumerate(moments_of(folder)) if moment == name][count - 1]


def wait_for_an_epoch(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not re.search("^ *1/", output(folder), re.MULTILINE):
        assert time.monotonic() < deadline, output(folder)
        time.sleep(0.02)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, **fields) -> None:
    """Changes items of a checkpoint's mappings; its digest fits again."""
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, {**checkpoint, **{name: {**checkpoint[name], **value} for name, value in fields.items()}})


@pytest.mark.parametrize("recipe", [HARD, SOFT, QUANTIZED], ids=["hard", "soft", "quantized"])
class TestKilled:
    @pytest.mark.parametrize("place", [0.3, 0.85])
    def test_at_any_moment(self, recipe, place, tmp_path, untouched, trained_run):
        reference = untouched(recipe)
        fatal = int(place * len(moments_of(reference)))
        assert begin(recipe, tmp_path, trained_run, fatal=fatal) == -signal.SIGKILL
        assert finish(recipe, tmp_path, trained_run) == 0, output(tmp_path)
        assert differences(reference / RUN, tmp_path / RUN) == []

    def test_between_the_best_and_the_last_checkpoint(self, recipe, tmp_path, untouched, trained_run):
        reference = untouched(recipe)
        fatal = nth(reference, "after replace", 7)
        assert begin(recipe, tmp_path, trained_run, fatal=fatal) == -signal.SIGKILL
        assert finish(recipe, tmp_path, trained_run) == 0, output(tmp_path)
        assert differences(reference / RUN, tmp_path / RUN) == []

    def test_in_the_middle_of_a_write(self, recipe, tmp_path, untouched, trained_run):
        assert begin(recipe, tmp_path, trained_run, file_limit=300_000) == -signal.SIGXFSZ
        leftovers = [path.stat().st_size for path in (tmp_path / RUN).glob(".partial-*")]
        assert leftovers == [300_000]
        assert finish(recipe, tmp_path, trained_run) == 0, output(tmp_path)
        assert differences(untouched(recipe) / RUN, tmp_path / RUN) == []

    def test_again_and_again(self, recipe, tmp_path, untouched, trained_run):
        reference = untouched(recipe)
        fatal = nth(reference, "after _train_step", 3)
        assert begin(recipe, tmp_path, trained_run, fatal=fatal) == -signal.SIGKILL
        for fatal in (2, 9, 12, 30):
            words = words_of(recipe, trained_run)
            assert wait(go_on(recipe.script, words, folder=tmp_path, fatal=fatal)) == -signal.SIGKILL
        assert finish(recipe, tmp_path, trained_run) == 0, output(tmp_path)
        assert differences(reference / RUN, tmp_path / RUN) == []

    def test_the_same_seed_gives_the_same_bits(self, recipe, tmp_path, untouched, trained_run):
        assert begin(recipe, tmp_path, trained_run) == 0
        assert differences(untouched(recipe) / RUN, tmp_path / RUN) == []


@pytest.mark.parametrize("recipe", [GRADUAL, GRADUAL_MASKED], ids=["compact", "masked"])
@pytest.mark.parametrize("place", [0.35, 0.55, 0.75])
def test_gradual_pruning_goes_on_between_its_steps(recipe, place, tmp_path, untouched, trained_run):
    reference = untouched(recipe)
    fatal = int(place * len(moments_of(reference)))
    assert begin(recipe, tmp_path, trained_run, fatal=fatal) == -signal.SIGKILL
    assert finish(recipe, tmp_path, trained_run) == 0, output(tmp_path)
    assert differences(reference / RUN, tmp_path / RUN) == []


def test_another_seed_gives_other_bits(tmp_path, untouched, trained_run):
    words = [*words_of(HARD, trained_run), "--seed", "2"]
    assert wait(start(HARD.script, words, folder=tmp_path)) == 0
    assert "model_last.pt differs" in differences(untouched(HARD) / RUN, tmp_path / RUN)


class TestStopped:
    @pytest.mark.parametrize(
        ("recipe", "number", "status"),
        [
            (DROPOUT, signal.SIGTERM, 143),
            (HARD, signal.SIGINT, 130),
            (SOFT, signal.SIGTERM, 143),
            (QUANTIZED, signal.SIGINT, 130),
            (RECALIBRATED, signal.SIGTERM, 143),
            (GRADUAL, signal.SIGTERM, 143),
            (INT8, signal.SIGTERM, 143),
        ],
        ids=["dropout", "hard", "soft", "quantized", "recalibrated", "gradual", "int8"],
    )
    def test_saves_within_the_epoch_and_says_how_to_go_on(self, recipe, number, status, tmp_path, untouched, trained_run):
        reference = untouched(recipe)
        fatal = nth(reference, "before _train_step", 3)
        assert begin(recipe, tmp_path, trained_run, fatal=fatal, signals=[number]) == status
        last_line = output(tmp_path).splitlines()[-1]
        assert f"stopped by {number.name} after epoch 2, step 1 of 2" in last_line
        assert last_line.endswith(f"{Path(sys.executable).name} {recipe.script}.py --resume {RUN}")
        state = load_checkpoint(tmp_path / RUN / "model_last.pt")["resume"]
        assert (state["epoch"], state["batch"]) == (1, 1)
        assert finish(recipe, tmp_path, trained_run) == 0, output(tmp_path)
        assert differences(reference / RUN, tmp_path / RUN) == []

    def test_at_once_by_a_second_interrupt(self, tmp_path, untouched, trained_run):
        reference = untouched(HARD)
        fatal = moments_of(reference).index("before replace", nth(reference, "after _train_step", 2))  # the checkpoint's
        assert begin(HARD, tmp_path, trained_run, fatal=fatal, signals=[signal.SIGINT] * 2) == -signal.SIGINT
        assert finish(HARD, tmp_path, trained_run) == 0, output(tmp_path)
        assert differences(reference / RUN, tmp_path / RUN) == []


def test_streamed_images_go_on_within_an_epoch(tmp_path, mixed_size_images):
    words = [*FOLDER_FLAGS.split(), "--data-dir", str(mixed_size_images), "--workers", "1"]
    assert wait(start("initial_train", words, folder=tmp_path / "untouched")) == 0, output(tmp_path / "untouched")
    fatal = nth(tmp_path / "untouched", "before _train_step", 3)
    stopped = tmp_path / "stopped"
    assert wait(start("initial_train", words, folder=stopped, fatal=fatal, signals=[signal.SIGTERM])) == 143, output(stopped)
    assert wait(go_on("initial_train", words, folder=stopped)) == 0, output(stopped)
    assert differences(tmp_path / "untouched" / RUN, stopped / RUN) == []


@pytest.fixture(scope="module")
def killed(tmp_path_factory, untouched, trained_run) -> Path:
    """The folder of a run that was killed in its last epoch."""
    folder = tmp_path_factory.mktemp("killed")
    fatal = nth(untouched(HARD), "before _train_step", 6)
    assert begin(HARD, folder, trained_run, fatal=fatal) == -signal.SIGKILL
    return folder


class TestDamaged:
    @pytest.fixture
    def interrupted(self, killed, tmp_path) -> Path:
        return shutil.copytree(killed, tmp_path / "interrupted")

    def test_last_state_falls_back_to_the_one_before(self, interrupted, untouched, trained_run):
        flip_bit(interrupted / RUN / "model_last.pt")
        assert finish(HARD, interrupted, trained_run) == 0, output(interrupted)
        assert "model_last.pt: damaged" in output(interrupted)
        assert "going on from the state before it, model_previous.pt" in output(interrupted)
        assert differences(untouched(HARD) / RUN, interrupted / RUN) == []

    def test_fallback_that_is_killed_too(self, interrupted, untouched, trained_run):
        flip_bit(interrupted / RUN / "model_last.pt")
        words = words_of(HARD, trained_run)
        for _ in range(2):  # in the write of its first state, and again
            assert wait(go_on(HARD.script, words, folder=interrupted, file_limit=400_000)) == -signal.SIGXFSZ
        assert finish(HARD, interrupted, trained_run) == 0, output(interrupted)
        assert differences(untouched(HARD) / RUN, interrupted / RUN) == []

    def test_without_a_whole_state_is_refused(self, interrupted, trained_run):
        for name in ("model_last.pt", "model_previous.pt"):
            flip_bit(interrupted / RUN / name)
        assert finish(HARD, interrupted, trained_run) == 2
        last_line = output(interrupted).splitlines()[-1]
        assert "model_last.pt: damaged" in last_line
        assert "model_previous.pt: damaged" in last_line

    def test_state_of_a_run_with_other_flags_is_refused(self, interrupted, tmp_path_factory, trained_run):
        other = tmp_path_factory.mktemp("other")
        words = [*words_of(HARD, trained_run), "--lr", "0.02", "--n-epochs", "1"]
        assert wait(start(HARD.script, words, folder=other)) == 0
        shutil.copy(other / RUN / "model_last.pt", interrupted / RUN / "model_last.pt")
        before = (interrupted / RUN / "metrics.jsonl").read_bytes()
        assert finish(HARD, interrupted, trained_run) == 2
        assert "its saved state is of a run with lr 0.02, config.json says 0.01" in output(interrupted)
        assert (interrupted / RUN / "metrics.jsonl").read_bytes() == before

    def test_metrics_are_refused_and_left_as_they_are(self, interrupted, trained_run):
        path = interrupted / RUN / "metrics.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"epoch": 0', b'"epoch" 0', 1))
        before = path.read_bytes()
        assert finish(HARD, interrupted, trained_run) == 2
        assert f"{RUN}/metrics.jsonl is damaged in line 1: no JSON" in output(interrupted).splitlines()[-1]
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (flip_bit, "model_best.pt: damaged"),
            (Path.unlink, "model_best.pt: no such file"),
            (lambda path: edit(path, metrics={"top1": 100.0}), "model_best.pt: is not the network of epoch"),
            (lambda path: edit(path, config={"lr": 7.0}), "its model_best.pt is of a run with"),
        ],
        ids=["damaged", "missing", "other metrics", "other flags"],
    )
    def test_best_network_is_refused(self, spoil, message, interrupted, trained_run):
        spoil(interrupted / RUN / "model_best.pt")
        before = (interrupted / RUN / "metrics.jsonl").read_bytes()
        assert finish(HARD, interrupted, trained_run) == 2
        assert message in output(interrupted).splitlines()[-1]
        assert (interrupted / RUN / "metrics.jsonl").read_bytes() == before

    def test_config_is_refused(self, interrupted, trained_run):
        config = json.loads((interrupted / RUN / "config.json").read_text())
        config["flags"]["lr"] = "fast"
        (interrupted / RUN / "config.json").write_text(json.dumps(config))
        assert finish(HARD, interrupted, trained_run) == 2
        assert "config.json does not fit this script: --lr: 'fast' is not a number above 0" in output(interrupted)


def test_a_run_that_does_not_know_the_newest_flags_goes_on(killed, tmp_path, untouched, trained_run):
    folder = shutil.copytree(killed, tmp_path / "older")
    config, state = json.loads((folder / RUN / "config.json").read_text()), load_checkpoint(folder / RUN / "model_last.pt")
    missing = {name: state["config"].pop(name) for name in ("channel_multiple", "hap_ts", "sync_bn", "prune_interval")}
    for name in missing:
        del config["flags"][name]
    (folder / RUN / "config.json").write_text(json.dumps(config))
    save_checkpoint(folder / RUN / "model_last.pt", state)
    assert finish(HARD, folder, trained_run) == 0, output(folder)
    assert not missing.keys() & load_checkpoint(folder / RUN / "model_previous.pt")["config"].keys()  # the one from above
    edit(folder / RUN / "model_previous.pt", config=missing)
    assert differences(untouched(HARD) / RUN, folder / RUN) == []


@pytest.mark.parametrize("recipe", [HARD, QUANTIZED], ids=lambda recipe: recipe.name)
def test_another_network_in_the_place_of_the_first_is_refused(recipe, tmp_path, untouched, trained_run):
    network = tmp_path / "network.pt"
    shutil.copy(trained_run / "model_best.pt", network)
    words = recipe.words(network)
    fatal = nth(untouched(recipe), "before _train_step", 4)
    assert wait(start(recipe.script, words, folder=tmp_path, fatal=fatal)) == -signal.SIGKILL
    checkpoint = load_checkpoint(network)
    checkpoint["state_dict"]["classifier.bias"] += 1e-3
    save_checkpoint(network, checkpoint)
    before = (tmp_path / RUN / "metrics.jsonl").read_bytes()
    assert wait(go_on(recipe.script, words, folder=tmp_path)) == 2
    flag = "--t-path" if recipe is HARD else "--load-path"
    assert f"error: {flag} {network}: holds other weights than when" in output(tmp_path).splitlines()[-1]
    assert (tmp_path / RUN / "metrics.jsonl").read_bytes() == before
    shutil.copy(trained_run / "model_best.pt", network)
    assert wait(go_on(recipe.script, words, folder=tmp_path)) == 0, output(tmp_path)


def test_a_run_that_is_alive_is_not_resumed(tmp_path, trained_run):
    words = [*words_of(HARD, trained_run), "--n-epochs", "100000"]
    alive = start(HARD.script, words, folder=tmp_path)
    try:
        wait_for_an_epoch(tmp_path)
        assert wait(start(HARD.script, ["--resume", str(RUN)], folder=tmp_path)) == 2
        assert "this run is still alive in another process" in output(tmp_path)
    finally:
        os.kill(alive, signal.SIGKILL)
    assert wait(alive) == -signal.SIGKILL


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_processes_leaves_the_workers_to_the_main_one(number, status, tmp_path, mixed_size_images):
    words = [*FOLDER_FLAGS.split(), "--data-dir", str(mixed_size_images), "--workers", "1", "--n-epochs", "100000"]
    child = start("initial_train", words, folder=tmp_path)
    try:
        os.setpgid(child, child)
        wait_for_an_epoch(tmp_path)
    finally:
        os.killpg(child, number)
    assert wait(child) == status, output(tmp_path)
    assert f"stopped by {number.name}" in output(tmp_path).splitlines()[-1]
    assert "resume" in load_checkpoint(tmp_path / RUN / "model_last.pt")


def test_raising_the_epochs_gives_the_longer_run(tmp_path, untouched, trained_run):
    words = [*words_of(HARD, trained_run), "--n-epochs", "2"]
    assert wait(start(HARD.script, words, folder=tmp_path)) == 0
    fatal = nth(tmp_path, "before _train_step", 1)
    resumed = ["--resume", str(RUN), "--n-epochs", "3"]
    assert wait(start(HARD.script, resumed, folder=tmp_path, fatal=fatal)) == -signal.SIGKILL
    assert finish(HARD, tmp_path, trained_run) == 0, output(tmp_path)  # without saying --n-epochs again
    long, short = (load_checkpoint(folder / RUN / "model_last.pt") for folder in (untouched(HARD), tmp_path))
    assert long["epoch"] == short["epoch"] == 2
    assert long["state_dict"].keys() == short["state_dict"].keys()
    assert all(torch.equal(tensor, short["state_dict"][name]) for name, tensor in long["state_dict"].items())
