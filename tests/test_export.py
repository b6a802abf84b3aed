"""The exported file is one that others can run, for any batch size, and nothing is written that is not the same function."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from selections import narrow
from torch import nn

import export
from deploy import comparison, exporters, int8_export
from models import build_model
from models.network_file import describe_network, load_network
from prune.compact import compact
from utils import cli, profile
from utils.checkpoints import save_checkpoint

FLAGS = ("--limit-batches", "1", "--batch-size", "8", "--workers", "0")


@pytest.fixture
def run_export(capsys):
    """Runs the script in this process; returns its exit status and what it printed."""

    def run(*words: object) -> tuple[int, str, str]:
        words = [str(word) for word in words]
        with (
            mock.patch.object(sys, "argv", ["export.py", *words]),
            mock.patch.object(profile, "MIN_RUN_SECONDS", 0.0),
            pytest.raises(SystemExit) as end,
        ):
            cli.run_script(export.get_args_parser, export.main, words)
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


def pruned_network() -> tuple[nn.Module, dict[str, list[int]]]:
    torch.manual_seed(0)
    network = build_model("resnet8", num_classes=10).eval()
    kept = {}
    for block in (*network.stage_1, *network.stage_2, *network.stage_3):
        for conv, norm in ((block.conv_a, block.bn_a), (block.conv_b, block.bn_b)):
            for tensor in (conv.weight, norm.weight, norm.bias):
                tensor.data[::2] = 0
    for name, module in network.named_modules():
        if name.startswith("stage") and isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            kept[name] = list(range(1, len(module.weight), 2))
    return network, kept


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The same function as a dense, a pruned and a compact checkpoint, and one that claims zeros where there are none."""
    folder = tmp_path_factory.mktemp("checkpoints")
    network, kept = pruned_network()
    small = compact(network, torch.randn(2, 3, 32, 32))
    contents = {
        "dense": (network.state_dict(), {}, False),
        "pruned": (network.state_dict(), kept, False),
        "compact": (small.state_dict(), small.kept, True),
        "dishonest": (build_model("resnet8", num_classes=10).state_dict(), kept, False),
    }
    for name, (state, channels, is_compact) in contents.items():
        description = describe_network(state, model="resnet8", num_classes=10, config={}, kept=channels, compact=is_compact)
        save_checkpoint(folder / f"{name}.pt", {**description, "epoch": 0, "metrics": {}})
    return {name: folder / f"{name}.pt" for name in contents}


@pytest.mark.parametrize("form", ["dense", "pruned", "compact"])
def test_onnx_runs_with_any_batch_size(form, checkpoints, run_export, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    output = tmp_path / "small.onnx"
    status, printed, _ = run_export("--load-path", checkpoints[form], "--format", "onnx", "--output", output, *FLAGS)
    assert status == 0
    assert "onnxruntime" in printed
    session = onnxruntime.InferenceSession(output.read_bytes(), providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 32, 32)
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        expected = load_network(checkpoints["dense"], flag="--load-path").network(images).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


FORMS = ("layouts between layers", "plain sums of wide layers")


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ({1: (1.0, 2.0), 64: (7.0, 4.0)}, FORMS[0]),  # products of 7 and 8
        ({1: (1.0, 2.0), 64: (7.0, 3.0)}, FORMS[1]),
        ({1: (2.0, 1.0), 64: (3.0, 7.0)}, FORMS[0]),
    ],
)
def test_a_form_is_the_faster_one_over_both_batch_sizes(seconds, fastest):
    def measured(runners, images, *, rounds):
        return dict(zip(runners, seconds[len(images)], strict=True))

    with mock.patch.object(exporters, "median_seconds", measured):
        form, remark = exporters.fastest_form(dict.fromkeys(FORMS), torch.randn(2, 3, 8, 8))
    assert form == fastest and remark.startswith(f"written with {fastest}, the faster form (batch 1: {FORMS[0]} ")
    assert exporters.fastest_form({"as it is": None}, torch.randn(2, 3, 8, 8)) == ("as it is", "")


class OfOneSize(nn.Module):
    """A sum of two convolutions, for images of one size alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        if x.shape[-1] != 48:
            raise RuntimeError(f"no images of {x.shape[-1]} pixels")
        return self.head((self.first(x) + self.second(x)).mean((2, 3)))


def test_the_forms_are_those_for_the_images_of_the_file():
    network, images, kept = OfOneSize().eval(), torch.randn(2, 3, 48, 48), {"first": [0, 1, 2], "second": [2, 5]}
    for name, channels in kept.items():
        for parameter in network.get_submodule(name).parameters():
            parameter.data[[channel for channel in range(8) if channel not in channels]] = 0
    forms = exporters.forms_of(network, narrow(network, kept, example=images), images)
    assert tuple(forms) == FORMS
    torch.testing.assert_close(forms[FORMS[1]](images), forms[FORMS[0]](images))


def test_the_form_that_is_measured_to_be_faster_is_written(checkpoints, run_export, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sizes = []
    for fastest in FORMS:
        with mock.patch.object(
            exporters, "median_seconds", lambda forms, *_, first=fastest, **__: {form: float(form != first) for form in forms}
        ):
            status, printed, _ = run_export(
                "--load-path", checkpoints["pruned"], "--output", tmp_path / f"{fastest}.onnx", *FLAGS
            )
        assert status == 0 and f"written with {fastest}" in printed
        sizes.append((tmp_path / f"{fastest}.onnx").stat().st_size)
    assert sizes[0] < 0.8 * sizes[1]


def test_pt2_runs_with_any_batch_size(checkpoints, run_export, tmp_path):
    output = tmp_path / "small.pt2"
    status, printed, _ = run_export("--load-path", checkpoints["compact"], "--format", "pt2", "--output", output, *FLAGS)
    assert status == 0 and "batch 64" in printed
    program = torch.export.load(output).module()
    images = torch.randn(3, 3, 32, 32)
    expected = load_network(checkpoints["dense"], flag="--load-path").network(images)
    torch.testing.assert_close(program(images), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_the_table_compares_dense_and_compact(checkpoints, run_export, tmp_path):
    _, printed, _ = run_export("--load-path", checkpoints["pruned"], "--format", "pt2", "--output", tmp_path / "a.pt2", *FLAGS)
    assert "dense: 75,290 parameters, 12,239,488 MACs" in printed
    assert "largest difference of the logits" in printed and "top1 on digits" in printed


def test_an_existing_file_is_kept_unless_forced(checkpoints, run_export, tmp_path):
    output = tmp_path / "small.pt2"
    output.write_text("mine")
    words = ("--load-path", checkpoints["compact"], "--format", "pt2", "--output", output, *FLAGS)
    status, _, errors = run_export(*words)
    assert (status, output.read_text()) == (2, "mine")
    assert "exists, choose another name or give --force" in errors
    assert run_export(*words, "--force")[0] == 0
    assert output.stat().st_size > 10_000


def test_python_source_lies_beside_its_weights_and_gives_the_same_bits(checkpoints, run_export, tmp_path):
    output = tmp_path / "small.py"
    words = ("--load-path", checkpoints["pruned"], "--format", "python", "--output", output, *FLAGS)
    status, printed, _ = run_export(*words)
    assert status == 0 and "exported 0.0e+00" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"small.py", "small.safetensors"}
    code = (
        "import torch, small\nnetwork = small.load()\ntorch.manual_seed(0)\nwith torch.no_grad():\n"
        "    print(network(torch.randn(2, 3, 32, 32)).flatten().tolist())"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    small = load_network(checkpoints["compact"], flag="--load-path").network
    torch.manual_seed(0)
    with torch.no_grad():
        assert json.loads(ended.stdout) == small(torch.randn(2, 3, 32, 32)).flatten().tolist()
    before = output.read_text()
    (tmp_path / "small.py").unlink()
    status, _, errors = run_export(*words)
    assert status == 2 and "small.safetensors: exists" in errors and not output.exists()
    assert run_export(*words, "--force")[0] == 0 and output.read_text() == before


def test_metadata_say_what_a_user_must_know(checkpoints, run_export, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    output = tmp_path / "small.onnx"
    assert run_export("--load-path", checkpoints["pruned"], "--output", output, *FLAGS)[0] == 0
    model = onnx.load(output)
    said = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert model.producer_name == "filter-pruning-self-distillation"
    assert (said["model"], said["run"], said["dataset"]) == ("resnet8", "pruned.pt", "digits")
    assert said["class_names"] == [str(digit) for digit in range(10)] and said["image_size"] == [32, 32]
    assert said["preprocessing"]["resize"] == [32, 32] and "mean" in said["preprocessing"]["values"]
    assert len(said["mean"]) == len(said["std"]) == 3 and 0 <= said["top1"] <= 100


def test_int8_is_checked_beside_float_in_each_runtime(checkpoints, run_export, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    output = tmp_path / "small.onnx"
    words = ("--load-path", checkpoints["pruned"], "--int8", "--calibration-images", "24", "--output", output, *FLAGS)
    with mock.patch.object(comparison, "median_seconds", lambda runners, _: dict.fromkeys(runners, 0.001)):
        status, printed, errors = run_export(*words, "--int8-tolerance", "100")
        assert status == 0, errors
        rows = [line for line in printed.splitlines() if line.startswith("onnxruntime ")]
        assert [re.split(" {2,}", row)[1] for row in rows] == ["dense, float", "small, float", "dense, int8", "small, int8"]
        assert "1.00 (1.00x)" in rows[0] and "int8 takes 0." in printed
        said = {entry.key: json.loads(entry.value) for entry in onnx.load(output).metadata_props}
        assert said["precision"] == "int8" and said["weight_bits"] == 7 and said["class_names"][0] == "0"
        written = output.read_bytes()
        with mock.patch.object(int8_export, "measure_files", worse_in_int8):
            status, _, errors = run_export(*words, "--int8-tolerance", "2.9", "--force")
    assert status == 2 and "--int8-tolerance 2.9: int8 costs 3.00 points in onnxruntime; fine-tune the network" in errors
    assert output.read_bytes() == written


def worse_in_int8(contents, data):
    rows = [comparison.Measured("onnxruntime", name, 90.0 - 3 * name.endswith("int8"), 1, {1: 1.0}) for name in contents]
    return rows, {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--load-path", "{dense}", "--output", "{folder}/a.pt2", "--format", "pt2", "--int8"),
            "--int8: only with --format onnx",
        ),
        (("--load-path", "{dense}", "--output", "{folder}/a.onnx", "--calibration-images", "8"), "only with --int8"),
        (("--load-path", "{dense}", "--output", "{folder}/a.onnx", "--int8-tolerance", "1"), "only with --int8"),
        (("--load-path", "{dense}", "--output", "{folder}/a.onnx", "--int8", "--calibration-images", "0"), "1 or more"),
        (("--load-path", "{dense}", "--output", "{folder}/a.txt", "--format", "python"), "a name that ends in .py"),
        (("--load-path", "{dishonest}", "--output", "{folder}/a.onnx"), "pruned channels must be exactly 0"),
        (("--load-path", "{folder}/none.pt", "--output", "{folder}/a.onnx"), "no such file"),
        (("--load-path", "{dense}", "--output", "{folder}/none/a.onnx"), "there is no folder"),
        (("--load-path", "{dense}", "--output", "{folder}", "--force"), "cannot be written"),
        (("--load-path", "{dense}", "--output", "{folder}/a.tflite", "--format", "tflite"), "invalid choice: 'tflite'"),
        (("--output", "{folder}/a.onnx"), "--load-path is required"),
        (("--load-path", "{dense}"), "--output is required"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, message, checkpoints, run_export, tmp_path):
    status, printed, errors = run_export(*(word.format(folder=tmp_path, **checkpoints) for word in words), *FLAGS)
    assert status == 2 and printed == ""
    assert message in errors and errors.count("\n") == 1 and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(checkpoints, run_export, tmp_path):
    with mock.patch.dict(sys.modules, {"onnxruntime": None}):
        status, _, errors = run_export("--load-path", checkpoints["dense"], "--output", tmp_path / "a.onnx", *FLAGS)
    assert status == 2 and "pip install -r requirements-export.txt" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_not_written(checkpoints, run_export, tmp_path):
    def broken(dense: nn.Module, small: nn.Module, images: torch.Tensor, **_: object) -> exporters.Export:
        return exporters.Export({".pt2": b"wrong"}, "nothing", lambda batch: small(batch) + 1)

    with mock.patch.dict(exporters.EXPORTERS, {"pt2": broken}):
        status, _, errors = run_export(
            "--load-path", checkpoints["dense"], "--format", "pt2", "--output", tmp_path / "a.pt2", *FLAGS
        )
    assert status == 2 and "the exported network differs" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_answers_no_number_is_not_exported(run_export, tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).abs().neg().log()\n"
        "def net(num_classes):\n"
        "    return Net(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    model, checkpoint = f"{path}:net", tmp_path / "model.pt"
    description = describe_network(build_model(model, num_classes=10).state_dict(), model=model, num_classes=10, config={})
    save_checkpoint(checkpoint, {**description, "epoch": 0, "metrics": {}})
    output = tmp_path / "small.onnx"
    status, _, errors = run_export("--load-path", checkpoint, "--model", model, "--output", output, *FLAGS)
    assert status == 2 and errors.count("\n") == 1 and "NaN" in errors
    assert not output.exists()
