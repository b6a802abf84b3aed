"""quantize_encode.py from its command line: a run, what it leaves, the way back, and what it refuses."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from models.network_file import load_network
from quantize.archive import differing_tensors, load_archive
from utils.checkpoints import load_checkpoint, save_checkpoint

FLAGS = ("--dataset=digits", "--n-epochs=1", "--limit-batches=2", "--batch-size=32", "--lr=0.001", "--device=cpu")
SCORING_FLAGS = ("--dataset=digits", "--limit-batches=2", "--batch-size=32", "--device=cpu")


@pytest.fixture(scope="module")
def pruned(trained_run, tmp_path_factory):
    """A dense checkpoint with four filters of one layer at zero."""
    checkpoint = load_checkpoint(trained_run / "model_best.pt")
    for name in ("conv_a.weight", "bn_a.weight", "bn_a.bias"):
        checkpoint["state_dict"][f"stage_1.0.{name}"][[1, 5, 6, 15]] = 0
    path = tmp_path_factory.mktemp("pruned") / "pruned.pt"
    save_checkpoint(path, checkpoint)
    return path


@pytest.fixture(scope="module")
def finished(run_script, pruned, tmp_path_factory):
    """The folder of a run at 4 bits."""
    save_dir = tmp_path_factory.mktemp("quantized")
    ended = run_script("quantize_encode", "--load-path", str(pruned), "--quan-bits", "4", "classifier=8", *FLAGS,
                       "--save-dir", str(save_dir), "--run-name", "run")  # fmt: skip
    assert ended.status == 0, ended.errors
    assert "identical: yes" in ended.output
    return save_dir / "run"


def test_the_weights_are_shared_and_the_pruned_filters_gone(finished):
    network = load_archive(finished / "model.huff")
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert len(layers) == 8
    assert network.get_submodule("stage_1.0.conv_a").out_channels == 12
    values = {name: layer.weight.unique().numel() for name, layer in layers.items()}
    assert values.pop("classifier") == 256
    assert set(values.values()) == {16}


def test_what_a_run_leaves(finished, pruned):
    summary = json.loads((finished / "summary.json").read_text())
    archive, compact = summary["archive"], summary["compact"]
    assert archive["file_bytes"] == (finished / "model.huff").stat().st_size
    assert compact["dense"]["file_bytes"] == (finished / "model_best.pt").stat().st_size
    assert compact["compact"]["file_bytes"] == (finished / "model_compact.pt").stat().st_size
    assert archive["ratio"] == compact["dense"]["file_bytes"] / archive["file_bytes"]
    assert archive["identical"] == "yes"
    assert set(summary["accuracy"]) == {"original", "quantized", "fine_tuned", "decoded"}
    assert summary["accuracy"]["decoded"] == summary["accuracy"]["fine_tuned"]
    assert summary["accuracy"]["decoded"]["top1"] == summary["best"]["top1"]
    assert sum(layer["coded_bytes"] for layer in archive["layers"]) == archive["total"]["coded_bytes"]


def test_both_checkpoints_hold_the_archived_network(finished):
    decoded = load_archive(finished / "model.huff")
    small = load_network(finished / "model_compact.pt", flag="--load-path")
    assert small.compact and differing_tensors(small.network, decoded) == []
    dense = load_network(finished / "model_best.pt", flag="--load-path")
    assert not dense.compact and not dense.network.stage_1[0].conv_a.weight[[1, 5, 6, 15]].any()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(dense.network(images), decoded(images), rtol=1e-4, atol=1e-4)


def test_decode_gives_a_checkpoint_back(finished, run_script, tmp_path):
    output = tmp_path / "decoded.pt"
    flags = ("--decode", str(finished / "model.huff"), "--output", str(output))
    assert run_script("quantize_encode", *flags).status == 0
    decoded = load_network(output, flag="--load-path")
    assert (decoded.model, decoded.num_classes) == ("resnet8", 10)
    assert differing_tensors(decoded.network, load_archive(finished / "model.huff")) == []

    output.write_bytes(b"precious")
    refused = run_script("quantize_encode", *flags)
    assert refused.status == 2 and "--force" in refused.errors and output.read_bytes() == b"precious"
    assert run_script("quantize_encode", *flags, "--force").status == 0
    assert load_network(output, flag="--load-path").compact


def test_inspect_prints_the_table(finished, run_script):
    ended = run_script("quantize_encode", "--inspect", str(finished / "model.huff"))
    lines = ended.output.splitlines()
    assert ended.status == 0 and "resnet8, 10 classes" in lines[0]
    row = next(line.split() for line in lines if line.startswith("stage_1.0.conv_a.weight"))
    assert row[1:3] == [str(4 * 16 * 16 * 9), str(12 * 16 * 9)]
    assert str((finished / "model.huff").stat().st_size) in lines[-1]


def test_evaluate_scores_archive_and_checkpoint_alike(finished, run_script):
    before = {path: path.stat().st_mtime_ns for path in finished.parent.rglob("*")}
    scores = [
        run_script("quantize_encode", "--evaluate", "--load-path", str(finished / name), *SCORING_FLAGS).output
        for name in ("model.huff", "model_compact.pt")
    ]
    assert scores[0] == scores[1] and "\nresnet8 on digits: loss " in f"\n{scores[0]}"
    assert {path: path.stat().st_mtime_ns for path in finished.parent.rglob("*")} == before


def test_a_resumed_run_ends_in_the_same_archive(finished, pruned, run_script, tmp_path):
    flags = ("--load-path", str(pruned), *FLAGS, "--save-dir", str(tmp_path))
    for name, epochs in (("whole", "2"), ("parts", "1")):
        assert run_script("quantize_encode", *flags, "--run-name", name, "--n-epochs", epochs).status == 0
    assert run_script("quantize_encode", "--resume", str(tmp_path / "parts"), "--n-epochs", "2").status == 0
    assert (tmp_path / "parts" / "model.huff").read_bytes() == (tmp_path / "whole" / "model.huff").read_bytes()


def test_a_dry_run_writes_nothing(pruned, run_script, tmp_path):
    ended = run_script("quantize_encode", "--load-path", str(pruned), *FLAGS, "--dry-run", "--save-dir", str(tmp_path / "saves"))
    assert ended.status == 0 and "stage_1.0.conv_a would share 32 values" in ended.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--load-path {pruned} --quan-bits 17", "--quan-bits 17: expected 1 to 16"),
        ("--load-path {pruned} --quan-bits 0", "--quan-bits 0: expected 1 to 16"),
        ("--load-path {pruned} --quan-bits stage_9=4", "no layer 'stage_9'"),
        ("--load-path {pruned} --quan-mode most", "--quan-mode"),
        ("--load-path {pruned} --model resnet56", "holds a resnet8, not the resnet56 of --model"),
        ("--load-path {pruned} --output x.pt", "--output x.pt: only with --decode"),
        ("--load-path {pruned} --force", "--force: only with --decode"),
        ("--load-path {archive}", "an archive, expected a checkpoint; decode it first: .*--decode .*model.huff"),
        ("--load-path missing.pt", "--load-path missing.pt"),
        ("", "--load-path is required"),
        ("--decode {archive}", "--output is required"),
        ("--decode {pruned} --output new.pt", "--decode .*pruned.pt: not an archive"),
        ("--decode {newer} --output new.pt", "format 4, newer than format 3"),
        ("--decode {archive} --inspect {archive}", "--inspect .* not with --decode"),
        ("--inspect {damaged}", "--inspect .*damaged.huff: damaged"),
        ("--inspect missing.huff", "--inspect missing.huff: cannot be read"),
        ("--evaluate --load-path {damaged}", "--load-path .*damaged.huff: damaged"),
        ("--evaluate --load-path {archive} --model resnet56", "holds a resnet8, not the resnet56 of --model"),
        ("--evaluate --load-path {archive} --dataset cifar100", "--data"),
        ("--evaluate --load-path missing.huff", "--load-path missing.huff"),
    ],
)
def test_bad_input_ends_in_one_line(flags, message, finished, pruned, run_script, tmp_path):
    archive = (finished / "model.huff").read_bytes()
    flipped = np.frombuffer(archive, np.uint8) ^ (np.arange(len(archive)) == len(archive) - 9).astype(np.uint8)
    (tmp_path / "damaged.huff").write_bytes(flipped.tobytes())
    (tmp_path / "newer.huff").write_bytes(archive.replace(b'format\\":2', b'format\\":4'))
    places = {"pruned": pruned, "archive": finished / "model.huff"}
    places |= {name: tmp_path / f"{name}.huff" for name in ("damaged", "newer")}
    words = [word.format(**places) for word in flags.split()]
    common = {"--decode": (), "--inspect": (), "--evaluate": SCORING_FLAGS}.get(words[0] if words else "", FLAGS)
    ended = run_script("quantize_encode", *common, "--save-dir", str(tmp_path / "saves"), "--data-dir", str(tmp_path), *words)
    assert ended.status == 2
    assert ended.errors.count("\n") == 1 and ended.errors.startswith("quantize_encode.py: error: ")
    assert re.search(message, ended.errors)
    assert not (tmp_path / "saves").exists() and {path.name for path in tmp_path.iterdir()} == {"damaged.huff", "newer.huff"}


@pytest.fixture(scope="module")
def for_int8(run_script, pruned, trained_run, tmp_path_factory):
    """The folder of a run that trained in simulated eight bits, taught by the unpruned network."""
    save_dir = tmp_path_factory.mktemp("int8")
    ended = run_script("quantize_encode", "--load-path", str(pruned), "--quan-mode", "int8", "--t-path",
                       str(trained_run / "model_best.pt"), "--distill", "hap", *FLAGS,
                       "--save-dir", str(save_dir), "--run-name", "run")  # fmt: skip
    assert ended.status == 0, ended.errors
    assert "8 layers compute in int8" in ended.output
    return save_dir / "run"


def test_what_training_for_int8_leaves(for_int8, run_script):
    summary = json.loads((for_int8 / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"original", "quantized", "fine_tuned"}
    assert summary["accuracy"]["fine_tuned"]["top1"] == summary["best"]["top1"]
    assert not (for_int8 / "model.huff").exists()
    dense, small = (load_network(for_int8 / f"model_{name}.pt", flag="--load-path") for name in ("best", "compact"))
    assert dense.int8 == small.int8 and len(small.int8) > 8
    assert small.compact and small.network.get_submodule("stage_1.0.conv_a").out_channels == 12
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(dense.network(images), small.network(images), rtol=1e-4, atol=1e-4)
    assert run_script("quantize_encode", "--evaluate", "--load-path", str(for_int8 / "model_best.pt"), *SCORING_FLAGS).status == 0


def test_onnxruntime_computes_what_was_trained(for_int8, run_script, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    words = ("--load-path", str(for_int8 / "model_compact.pt"), "--int8", "--calibration-images", "16", "--int8-tolerance", "100")
    ended = run_script("export", *words, "--output", str(tmp_path / "small.onnx"), "--limit-batches", "2", "--batch-size", "32")
    assert ended.status == 0, ended.errors
    (share,) = re.findall(r"the class that was simulated in training to ([\d.]+) % of the test images", ended.output)
    assert float(share) >= 96  # 62 of 64 images


def test_ranges_of_another_network_are_refused(for_int8, run_script, tmp_path):
    pytest.importorskip("onnxscript")
    checkpoint = load_checkpoint(for_int8 / "model_compact.pt")
    checkpoint["int8"]["odd"] = checkpoint["int8"].pop("relu")
    save_checkpoint(tmp_path / "odd.pt", checkpoint)
    words = ("--load-path", str(tmp_path / "odd.pt"), "--int8", "--output", str(tmp_path / "small.onnx"))
    ended = run_script("export", *words, "--limit-batches", "1", "--batch-size", "8")
    assert ended.status == 2 and "its int8 ranges are those of another network or version" in ended.errors
    assert not (tmp_path / "small.onnx").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--quan-mode", "int8", "--quan-bits", "4"), "--quan-bits 4: only where weights are shared"),
        (("--distill", "hap"), "only with --quan-mode int8"),
        (("--t-path", "{teacher}"), "only with --quan-mode int8"),
        (("--quan-mode", "int8", "--distill", "hap"), "needs a trained teacher, give --t-path"),
        (("--quan-mode", "int8", "--t-path", "{teacher}"), "teaches by no loss, name one with --distill"),
        (("--quan-mode", "int8", "--t-path", "none.pt", "--distill", "kd"), "--t-path none.pt: no such file"),
        (
            (
                "--quan-mode",
                "int4",
            ),
            "invalid choice: 'int4'",
        ),
    ],
)
def test_bad_flags_of_int8_are_one_line(words, message, run_script, pruned, trained_run, tmp_path):
    words = [word.format(teacher=trained_run / "model_best.pt") for word in words]
    ended = run_script("quantize_encode", "--load-path", str(pruned), *words, *FLAGS, "--save-dir", str(tmp_path))
    assert ended.status == 2 and message in ended.errors and ended.errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_saw_other_images_is_refused(run_script, pruned, trained_run, tmp_path):
    teacher = load_checkpoint(trained_run / "model_best.pt")
    teacher["mean"] = [0.1, 0.2, 0.3]
    save_checkpoint(tmp_path / "teacher.pt", teacher)
    words = ("--load-path", str(pruned), "--quan-mode", "int8", "--t-path", str(tmp_path / "teacher.pt"), "--distill", "kd")
    ended = run_script("quantize_encode", *words, *FLAGS, "--save-dir", str(tmp_path / "saves"))
    assert ended.status == 2 and str(tmp_path / "teacher.pt") in ended.errors and "mean 0.1 0.2 0.3" in ended.errors
    assert not (tmp_path / "saves").exists()


TRELLIS_FLAGS = ("--codec", "trellis", "--dataset=digits", "--limit-batches=2", "--batch-size=32", "--device=cpu")


@pytest.fixture(scope="module")
def in_levels(run_script, pruned, tmp_path_factory):
    """The folder of a run of the second codec that may lose nothing on held-out images, and what it printed."""
    save_dir = tmp_path_factory.mktemp("levels")
    ended = run_script("quantize_encode", "--load-path", str(pruned), "--max-drop", "0", *TRELLIS_FLAGS,
                       "--save-dir", str(save_dir), "--run-name", "run")  # fmt: skip
    assert ended.status == 0, ended.errors
    return save_dir / "run", ended.output


def test_what_the_second_codec_leaves(in_levels, pruned):
    folder, output = in_levels
    summary = json.loads((folder / "summary.json").read_text())
    archive = summary["archive"]
    assert archive["file_bytes"] == (folder / "model.huff").stat().st_size
    assert archive["drop_on_held_out"] <= 0
    assert f"{archive['file_bytes']:,} bytes, {archive['drop_on_held_out']:+.2f} points lost on held-out" in output
    assert summary["accuracy"]["decoded"] == summary["accuracy"]["compressed"] and "identical: yes" in output
    decoded = load_archive(folder / "model.huff")
    assert decoded.get_submodule("stage_1.0.conv_a").out_channels == 12
    assert differing_tensors(load_network(folder / "model_compact.pt", flag="--load-path").network, decoded) == []
    assert archive["file_bytes"] < pruned.stat().st_size / 8


def test_the_step_that_is_kept_is_the_coarsest_that_was_found_within_the_drop(in_levels):
    folder, output = in_levels
    steps = re.findall(r"step (\S+): ([\d,]+) bytes, ([+-][\d.]+) points lost", output)
    within = [(float(step), int(size.replace(",", ""))) for step, size, drop in steps if float(drop) <= 0]
    assert len(within) < len(steps)
    assert json.loads((folder / "summary.json").read_text())["archive"]["file_bytes"] == max(within)[1]


def test_an_archive_of_the_second_codec_is_scored_and_inspected(in_levels, run_script):
    folder, _ = in_levels
    names = ("model.huff", "model_compact.pt")
    scores = [run_script("quantize_encode", "--evaluate", "--load-path", str(folder / name), *SCORING_FLAGS) for name in names]
    assert scores[0].status == 0 and scores[0].output == scores[1].output
    inspected = run_script("quantize_encode", "--inspect", str(folder / "model.huff"))
    assert inspected.status == 0 and str((folder / "model.huff").stat().st_size) in inspected.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-bytes", "100"), r"--max-bytes 100: the least that an archive of this network takes is \d+"),
        (("--max-bytes", "0"), "--max-bytes"),
        (("--max-drop", "-1"), "--max-drop"),
        (("--max-drop", "1", "--max-bytes", "5000"), "--max-drop 1.*only without --max-bytes"),
        (("--quan-bits", "4"), "--quan-bits 4: only without --codec trellis"),
        (("--n-epochs", "1"), "--n-epochs 1: only without --codec trellis"),
        (("--codec", "huffman", "--max-drop", "1"), "--max-drop 1.*only with --codec trellis"),
        (("--codec", "zip"), "--codec"),
    ],
)
def test_bounds_that_the_second_codec_cannot_meet(words, message, pruned, run_script, tmp_path):
    ended = run_script(
        "quantize_encode", "--load-path", str(pruned), *TRELLIS_FLAGS, "--save-dir", str(tmp_path / "saves"), *words
    )
    assert ended.status == 2 and ended.errors.count("\n") == 1
    assert re.search(message, ended.errors)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_the_second_codec_writes_nothing(pruned, run_script, tmp_path):
    ended = run_script(
        "quantize_encode", "--load-path", str(pruned), *TRELLIS_FLAGS, "--dry-run", "--save-dir", str(tmp_path / "s")
    )
    assert ended.status == 0 and "at most 0.3 points lost" in ended.output
    assert not list(tmp_path.iterdir())
