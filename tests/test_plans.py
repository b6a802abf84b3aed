"""What a run says before it trains: what begins, the plan of --dry-run, and warnings of what most often goes wrong."""

import os
import pty
import shutil
from pathlib import Path

import pytest
import torch
from forked import Ended, run_forked
from selections import prunable_layers

from models import build_model
from models.network_file import describe_network, load_network
from prune.masks import keep_count
from utils.checkpoints import load_checkpoint, save_checkpoint

TINY = "--n-epochs 1 --limit-batches 2 --batch-size 16 --device cpu"


@pytest.fixture
def teacher(trained_run) -> str:
    return str(trained_run / "model_best.pt")


class TestAnnouncement:
    """The first line of a run: network, data, device, epochs."""

    def test_is_the_first_line_of_output_and_log(self, teacher, tmp_path, run_script):
        words = [
            "--t-path",
            teacher,
            "--s-model",
            "resnet32",
            "--save-dir",
            str(tmp_path),
            "--run-name",
            "run",
            "--distill",
            "kd",
        ]
        ended = run_script("pruning", *words, *TINY.split())
        assert ended.status == 0, ended.errors
        line = "network: resnet32, teacher resnet8; data: digits; device: cpu, 1 threads; epochs: 1"
        assert ended.output.splitlines()[0] == line
        assert (tmp_path / "pruning.txt").read_text().splitlines()[0].endswith(f" run {line}")

    def test_is_there_before_the_data_are_read_for_who_watches(self, tmp_path, image_writer):
        for place in ("train/cat", "test/cat"):
            image_writer(tmp_path / "set" / place, sizes=(40, 64))
        (tmp_path / "set" / "test" / "cat" / "1.png").write_bytes(b"no image")
        words = ["initial_train.py", "--model", "resnet8", "--dataset", "folder", "--data-dir", str(tmp_path / "set")]
        ended, shown = in_terminal(*words, *TINY.split(), "--save-dir", str(tmp_path / "saves"))
        assert ended.status == 2 and "1.png cannot be read" in ended.errors
        assert shown == f"network: resnet8; data: {tmp_path}/set; device: cpu, 1 threads; epochs: 1\r\n"

    def test_says_how_many_epochs_a_resumed_run_has_and_says_it_once(self, trained_run, tmp_path, run_script, monkeypatch):
        monkeypatch.setattr("utils.training.session._is_watched", lambda: True)
        shutil.copytree(trained_run, tmp_path / "run")
        ended = run_script("initial_train", "--resume", str(tmp_path / "run"), "--n-epochs", "3")
        line = "network: resnet8; data: digits; device: cpu, 1 threads; epochs: 3, 2 of them done\n"
        assert ended.output.startswith(line) and ended.output.count("network: ") == 1
        assert line in (tmp_path / "initial_train.txt").read_text()


def in_terminal(script: str, *words: str) -> tuple[Ended, str]:
    """Runs a script whose output is a terminal, and gives what is shown there."""
    ours, theirs = pty.openpty()
    ended = run_forked(script, *words, streams={1: theirs})
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    return ended, shown


class TestDryRun:
    """Every check of a real run, the plan, and not a byte written."""

    def plan(self, run_script, script: str, folder: Path, *words: str) -> str:
        before = sorted(folder.rglob("*"))
        ended = run_script(script, *words, *TINY.split(), "--save-dir", str(folder / "new" / "saves"), "--dry-run")
        assert ended.status == 0, ended.errors
        assert sorted(folder.rglob("*")) == before
        assert ended.output.endswith("dry run: nothing was written\n")
        assert f"would write to {folder}/new/saves/" in ended.output
        assert "MiB free" in ended.output
        assert "training: 1 epochs of 2 steps of 16 images" in ended.output
        return ended.output

    def test_pruning_tells_the_width_of_every_layer(self, teacher, tmp_path, run_script):
        words = ["--t-path", teacher, "--s-copy-t", "--prune-rates", "0.6", "--channel-multiple", "8"]
        plan = self.plan(run_script, "pruning", tmp_path, *words, "--schedule", "0", "--lr-drops", "0.5")
        for layer in prunable_layers(load_network(teacher, flag="").network):
            keep = keep_count(layer.filters, 0.6, multiple=8)
            assert f"{layer.name} would keep {keep} of {layer.filters}\n" in plan
        assert "learning rate: 0.005 from epoch 1" in plan
        sizes = [int(line.split()[1].replace(",", "")) for line in plan.splitlines() if line.startswith(("dense:", "pruned:"))]
        assert sizes[0] == sum(parameter.numel() for parameter in build_model("resnet8", num_classes=10).parameters())
        assert sizes[1] < 0.5 * sizes[0]

    def test_of_plain_distillation_tells_the_loss(self, teacher, tmp_path, run_script):
        words = ["--t-path", teacher, "--s-copy-t", "--distill", "dkd", "--dkd-beta", "2", "--label-smoothing", "0.1"]
        plan = self.plan(run_script, "pruning", tmp_path, *words)
        assert "loss: CE (labels smoothed by 0.1) + (1, rising over 1 epochs) DKD (T 4, alpha 1, beta 2)\n" in plan
        assert "averaged" not in plan

    def test_of_a_pruning_tells_its_loss_and_what_is_averaged(self, teacher, tmp_path, run_script):
        words = ["--t-path", teacher, "--s-copy-t", "--prune-rates", "0.6", "--prune-mode", "filter-a", "--distill", "hap"]
        plan = self.plan(run_script, "pruning", tmp_path, *words, "--ema", "0.99", "--ships", "trained")
        assert "loss: CE + 0.9 KD (T 4) + 700 HAP (ts 3)\n" in plan
        assert "weights: averaged over the steps, decay 0.99; the trained network is shipped\n" in plan

    def test_of_a_first_training_tells_its_loss_and_what_is_averaged(self, tmp_path, run_script):
        words = ["--model", "resnet8", "--label-smoothing", "0.2", "--ema", "0.9"]
        plan = self.plan(run_script, "initial_train", tmp_path, *words)
        assert "loss: CE (labels smoothed by 0.2)\n" in plan
        assert "weights: averaged over the steps, decay 0.9; the average is shipped\n" in plan
        assert "loss: CE\n" in self.plan(run_script, "initial_train", tmp_path, *words[:2])

    def test_quantization_tells_the_shared_values(self, teacher, tmp_path, run_script):
        words = ["--load-path", teacher, "--quan-mode", "fc-quan", "--quan-bits", "3"]
        plan = self.plan(run_script, "quantize_encode", tmp_path, *words)
        assert "classifier would share 8 values\n" in plan and "loss: CE\n" in plan

    def test_of_a_billion_epochs_is_there_at_once(self, tmp_path, run_script):
        words = ["--model", "resnet8", *TINY.split(), "--n-epochs", str(10**9), "--save-dir", str(tmp_path), "--dry-run"]
        ended = run_script("initial_train", *words, "--schedule", "1", "60", str(10**8), "--lr-drops", "10", "1", "0.2")
        assert ended.status == 0, ended.errors
        assert "training: 1000000000 epochs of 2 steps of 16 images on cpu, 2000000000 steps in all\n" in ended.output
        assert "learning rate: 0.01 from epoch 1, 0.1 from epoch 2, 0.02 from epoch 100000001\n" in ended.output

    def test_of_a_resumed_run_leaves_it_alone(self, trained_run, run_script):
        before = {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()}
        ended = run_script("initial_train", "--resume", str(trained_run), "--dry-run", "--n-epochs", "9")
        assert ended.status == 0, ended.errors
        assert f"would write to {trained_run} and " in ended.output
        assert {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()} == before


class TestWarnings:
    def output(self, run_script, folder: Path, *words: str) -> str:
        ended = run_script("pruning", *words, *TINY.split(), "--save-dir", str(folder))
        assert ended.status == 0, ended.errors
        return ended.output

    def test_a_teacher_at_chance(self, tmp_path, run_script):
        network = build_model("resnet8", num_classes=10)
        torch.nn.init.zeros_(network.classifier.weight)  # every image is the class of the largest bias
        checkpoint = describe_network(network.state_dict(), model="resnet8", num_classes=10, config={})
        save_checkpoint(tmp_path / "wrong.pt", checkpoint)
        printed = self.output(run_script, tmp_path / "saves", "--t-path", str(tmp_path / "wrong.pt"), "--s-copy-t")
        assert "WARNING: the teacher scores at chance (10.0) on digits: is --t-path the right file?" in printed

    def test_a_schedule_behind_the_last_epoch(self, teacher, tmp_path, run_script):
        words = ["--t-path", teacher, "--s-copy-t", "--schedule", "5", "--lr-drops", "0.1"]
        assert "WARNING: --schedule 5 lies behind the last epoch, 0" in self.output(run_script, tmp_path, *words)

    def test_a_layer_without_filters(self, teacher, tmp_path, run_script):
        trained = load_checkpoint(teacher)
        state = {name: value.clone() for name, value in trained["state_dict"].items()}
        for name in ("conv_a.weight", "bn_a.weight", "bn_a.bias"):
            state[f"stage_1.0.{name}"].zero_()
        kept = {"stage_1.0.conv_a": [], "stage_1.0.bn_a": []}
        save_checkpoint(tmp_path / "emptied.pt", {**trained, "state_dict": state, "kept": kept})
        printed = self.output(run_script, tmp_path / "saves", "--s-path", str(tmp_path / "emptied.pt"))
        assert "WARNING: stage_1.0.conv_a has lost every filter" in printed
