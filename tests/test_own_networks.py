"""Networks of others through the entry scripts; code of a file runs because somebody types its name, and for no other reason."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from models import build_model
from models.network_file import describe_network, load_network
from quantize.archive import differing_tensors, load_archive, save_archive
from utils.checkpoints import load_checkpoint, save_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
FEW = ["--limit-batches", "2", "--batch-size", "16", "--device", "cpu"]
SHORT = [*FEW, "--n-epochs", "1", "--schedule", "--lr-drops"]
NETWORKS = (Path(__file__).parent / "support" / "networks_of_others.py").read_text()


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
            ended = run_script(script, "--evaluate", "--load-path", str(trained / "model_best.pt"), *FEW)
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
    ended = run_script("initial_train", "--evaluate", "--load-path", str(trained / "model_best.pt"), "--model", name, *FEW)
    assert ended.status == 0, ended.errors
    ended = run_script("initial_train", "--resume", str(trained), "--model", name, "--n-epochs", "2")
    assert ended.status == 0, ended.errors
    assert " 2/2 " in ended.output


def test_images_of_a_size_that_a_network_refuses_are_one_line(tmp_path, run_script):
    words = ("--model", "torchvision/vit_b_16", *SHORT, "--dry-run", "--save-dir", str(tmp_path))
    ended = run_script("initial_train", *words)
    assert ended.status == 2
    assert "--model torchvision/vit_b_16: cannot take 32x32 images" in ended.errors
    assert ended.errors.count("\n") == 1


def test_a_criterion_that_reads_batch_norm_names_the_layers_that_have_none(tmp_path, run_script):
    path = tmp_path / "nets.py"
    path.write_text(
        "from torch import nn\n"
        "def small(num_classes):\n"
        "    bare, fixed, read = (nn.Conv2d(channels, 8, 3) for channels in (3, 8, 8))\n"
        "    norms = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8)\n"
        "    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)\n"
        "    return nn.Sequential(bare, nn.ReLU(), fixed, norms[0], nn.ReLU(), read, norms[1], *head)\n"
    )
    flags = ["--s-model", f"{path}:small", "--prune-mode", "filter-bn", "--prune-rates", "0.5", *SHORT]
    ended = run_script("pruning", *flags, "--save-dir", str(tmp_path / "saves"))
    assert ended.status == 2 and ended.errors.count("\n") == 1
    assert "--prune-mode filter-bn: no batch norm with a weight reads 0, 2 alone" in ended.errors
    assert not (tmp_path / "saves").exists()
    planned = run_script("pruning", *flags, "--exclude-layers", "0", "2", "--dry-run")
    assert planned.status == 0 and "5 would keep 4 of 8" in planned.output


def test_a_network_with_other_classes_than_asked_for_is_refused(tmp_path, run_script):
    path = tmp_path / "nets.py"
    path.write_text(NETWORKS + "\ndef fixed(num_classes):\n    return Small(4)\n")
    ended = run_script("initial_train", "--model", f"{path}:fixed", *SHORT, "--dry-run", "--save-dir", str(tmp_path))
    assert ended.status == 2
    assert "must return logits of shape" in ended.errors


ASKING = """
import torch.nn.functional as F
from torch import nn


class Asking(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 16, 3), nn.Linear(16, num_classes)

    def forward(self, images):
        assert images.shape[-2:] == (40, 40), images.shape
        missing = -images.shape[-1] % 48
        if missing:
            images = F.pad(images, (0, missing, 0, missing))
        maps = F.relu(self.norm(self.first(images)))
        return self.head(F.relu(self.second(maps)).mean((2, 3)))
"""


def test_a_network_that_asks_for_the_size_of_its_images_is_rebuilt_for_that_size(tmp_path, image_writer, run_script):
    """Files are read where no image has come yet; pruned, quantized, decoded, exported, trained on and pruned again."""
    pytest.importorskip("onnxruntime")
    (tmp_path / "nets.py").write_text(ASKING)
    name = f"{tmp_path / 'nets.py'}:Asking"
    best, small = (tmp_path / "pruned" / file for file in ("model_best.pt", "model_compact.pt"))
    for part, label in itertools.product(("train", "test"), ("ant", "bee")):
        image_writer(tmp_path / "images" / part / label, sizes=[40] * 8)
    data = ["--dataset", "folder", "--data-dir", str(tmp_path / "images")]
    few, run = [*FEW, *data], [*SHORT, *data, "--save-dir", str(tmp_path), "--run-name"]
    commands = [
        ("pruning", "--s-model", name, "--prune-mode", "filter-a", "--prune-rates", "0.5", *run, "pruned"),
        ("quantize_encode", "--load-path", str(small), "--model", name, *run, "quantized"),
        ("quantize_encode", "--evaluate", "--load-path", str(tmp_path / "quantized" / "model.huff"), "--model", name, *few),
        ("export", "--load-path", str(small), "--model", name, *data, "--output", str(tmp_path / "small.onnx")),
        ("initial_train", "--load-path", str(best), "--model", name, *run, "trained_on"),
        ("pruning", "--t-path", str(best), "--t-model", name, "--s-copy-t", "--distill", "hap", "--hap-ts", "1", "--prune-mode",
         "filter-nggm", "--budget", "macs=0.3", *run, "pruned_again"),
    ]  # fmt: skip
    for script, *flags in commands:
        ended = run_script(script, *flags)
        assert ended.status == 0, ended.errors
        assert "trains the large network" not in ended.output
    dense = load_network(best, flag="--load-path", model=name).network
    compact = load_network(small, flag="--load-path", model=name)
    images = torch.rand(2, 3, 40, 40)
    assert compact.compact and compact.kept
    assert torch.allclose(dense(images), compact.network(images), atol=1e-5)
    assert (tmp_path / "pruned_again" / "model_compact.pt").exists()


class TestThePage:
    """docs/own_network.md: what it shows runs as it stands there."""

    PAGE = (REPOSITORY / "docs" / "own_network.md").read_text()
    FILE, PROGRAM = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)

    def test_the_program(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "nets.py").write_text(self.FILE)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        exec(compile(self.PROGRAM, "own_network.md", "exec"), {})
        checkpoint = load_checkpoint("small.pt")
        assert checkpoint["kept"] and Path("small.py").stat().st_size and Path("small.safetensors").stat().st_size
        network = build_model("nets.py:small", num_classes=10)
        save_archive("small.huff", network, model="nets.py:small", num_classes=10)
        assert differing_tensors(network, load_archive("small.huff", model="nets.py:small")) == []

    def test_the_commands(self, tmp_path, monkeypatch, run_script):
        """On fewer images than on the page."""
        (tmp_path / "nets.py").write_text(self.FILE)
        monkeypatch.chdir(tmp_path)
        for line in re.findall(r"^python3 (.*)$", self.PAGE, re.MULTILINE):
            script, *words = line.split()
            words += ["--limit-batches", "2"]
            if "--n-epochs" in words:
                words += ["--n-epochs", "1", "--schedule", "--lr-drops", "--device", "cpu"]
            ended = run_script(script.removesuffix(".py"), *words)
            assert ended.status == 0, ended.errors
        assert (tmp_path / "own.onnx").stat().st_size > 10_000


def test_a_network_of_timm_goes_all_the_way(tmp_path, run_script):
    """Trained, pruned with HAP, quantized, encoded, decoded and exported, by name alone."""
    pytest.importorskip("timm")
    pytest.importorskip("onnxruntime")
    name, best = "timm/mobilenetv3_small_050", "model_best.pt"
    commands = [
        ("initial_train", "--model", name, "--run-name", "teacher"),
        ("pruning", "--t-path", str(tmp_path / "teacher" / best), "--s-copy-t", "--distill", "hap", "--prune-rates", "0.6",
         "--samp-batches", "1", "--run-name", "pruned"),
        ("quantize_encode", "--load-path", str(tmp_path / "pruned" / best), "--run-name", "quantized"),
    ]  # fmt: skip
    for script, *flags in commands:
        ended = run_script(script, *flags, *SHORT, "--save-dir", str(tmp_path))
        assert ended.status == 0, ended.errors
    assert "identical: yes" in ended.output
    archive = load_archive(tmp_path / "quantized" / "model.huff")
    compact = load_network(tmp_path / "quantized" / "model_compact.pt", flag="--load-path")
    assert compact.model == name and differing_tensors(archive, compact.network) == []
    pruned = load_network(tmp_path / "pruned" / "model_compact.pt", flag="--load-path").network
    whole = build_model(name, num_classes=10)
    assert sum(map(torch.numel, pruned.parameters())) < 0.8 * sum(map(torch.numel, whole.parameters()))
    flags = (
        "--load-path",
        str(tmp_path / "quantized" / best),
        "--limit-batches",
        "1",
        "--output",
        str(tmp_path / "network.onnx"),
    )
    ended = run_script("export", *flags)
    assert ended.status == 0, ended.errors


TRAINING_PATHS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, beside):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 16, 3, 2)
        self.head, self.auxiliary, self.beside = nn.Linear(16, num_classes), nn.Linear(8, num_classes), beside

    def forward(self, x):
        x = self.first(x).relu()
        logits = self.head(self.second(x).relu().mean((2, 3)))
        return self.beside(logits, self.auxiliary(x.mean((2, 3)))) if self.training else logits

def auxiliary(num_classes):
    return Net(num_classes, lambda logits, others: (logits, others))

def mapping(num_classes):
    return Net(num_classes, lambda logits, others: {"out": logits, "aux": others})

def other_classes(num_classes):
    return Net(num_classes, lambda logits, others: (logits[:, :3], others))
"""


@pytest.fixture
def training_paths(tmp_path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(TRAINING_PATHS)
    return path


def test_a_network_with_auxiliary_heads_trains_by_its_logits_and_says_so_once(training_paths, tmp_path, run_script):
    model = f"{training_paths}:auxiliary"
    ended = run_script("initial_train", "--model", model, *SHORT, "--save-dir", str(tmp_path), "--run-name", "run")
    assert ended.status == 0, ended.errors
    said = f"--model {model} returns a tuple of 2 in training: it trains by the first entry, the logits"
    assert (tmp_path / "initial_train.txt").read_text().count(said) == 1
    before, after = build_model(model, num_classes=10), load_checkpoint(tmp_path / "run" / "model_best.pt")["state_dict"]
    assert after.keys() == before.state_dict().keys()


@pytest.mark.parametrize("function", ["mapping", "other_classes"])
def test_what_holds_no_logits_in_training_is_refused_before_a_folder_is_made(function, training_paths, tmp_path, run_script):
    model = f"{training_paths}:{function}"
    ended = run_script("initial_train", "--model", model, *SHORT, "--save-dir", str(tmp_path / "saves"))
    assert ended.status == 2 and ended.errors.count("\n") == 1
    assert f"--model {model}: must return logits of shape (8, 10) for 8 images in training too" in ended.errors
    assert not (tmp_path / "saves").exists()


HIDDEN = """
import random
import torch
from torch import nn

def block(channels, width):
    return nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

class FrozenStem(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.body, self.head = block(3, 8), block(8, 8), nn.Linear(8, num_classes)

    def forward(self, x):
        with torch.no_grad():
            x = self.stem(x)
        return self.head(self.body(x).mean((2, 3)))

class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x / 0.8 * (torch.rand(x.shape[0], 1, 1, 1, device=x.device) < 0.8)

class Residual(FrozenStem):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.branch, self.drop = nn.Conv2d(8, 8, 3, 1, 1), DropPath()

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.body(x + self.drop(self.branch(x))).mean((2, 3)))

def frozen_stem(num_classes):
    return FrozenStem(num_classes)

def drop_path(num_classes):
    return Residual(num_classes)
"""


@pytest.fixture
def untrained(tmp_path):
    """Writes a checkpoint of a network of the file; gives its path and the flags that prune a copy of it."""
    path = tmp_path / "nets.py"
    path.write_text(HIDDEN)

    def write(function: str) -> tuple[Path, list[str]]:
        model, checkpoint = f"{path}:{function}", tmp_path / "teacher.pt"
        torch.manual_seed(0)
        description = describe_network(build_model(model, num_classes=10).state_dict(), model=model, num_classes=10, config={})
        save_checkpoint(checkpoint, {**description, "epoch": 0, "metrics": {}})
        flags = ["--t-path", str(checkpoint), "--t-model", model, "--s-copy-t", "--prune-rates", "0.5", *SHORT]
        return checkpoint, [*flags, "--save-dir", str(tmp_path / "saves"), "--run-name", "run"]

    return write


def test_layers_without_gradients_stay_as_they_are_under_distillation(untrained, tmp_path, run_script):
    checkpoint, flags = untrained("frozen_stem")
    ended = run_script("pruning", *flags, "--distill", "kd", "--exclude-layers", "stem.0", "--weight-decay", "0")
    assert ended.status == 0, ended.errors
    before, after = (load_checkpoint(path)["state_dict"] for path in (checkpoint, tmp_path / "saves" / "run" / "model_last.pt"))
    assert torch.equal(after["stem.0.weight"], before["stem.0.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


REFUSALS = {
    "its feature maps there are not known": ["--distill", "at"],
    "its narrow form can only be evaluated; choose masked": ["--train-form", "compact"],
}


@pytest.mark.parametrize("consequence", REFUSALS)
def test_what_would_train_layers_without_gradients_is_refused_before_a_folder_is_made(
    consequence, untrained, tmp_path, run_script
):
    ended = run_script("pruning", *untrained("frozen_stem")[1], *REFUSALS[consequence])
    assert ended.status == 2 and ended.errors.count("\n") == 1
    assert re.search(rf"FrozenStem runs under torch.no_grad at nets.py:\d+, which no graph holds: {consequence}", ended.errors)
    assert not (tmp_path / "saves").exists()


def test_a_drop_path_of_ones_own_trains_in_the_small_form_with_feature_maps(untrained, tmp_path, run_script):
    ended = run_script("pruning", *untrained("drop_path")[1], "--distill", "at", "--train-form", "compact")
    assert ended.status == 0, ended.errors
