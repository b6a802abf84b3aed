"""`--amp` and `--compile` change how fast a step is, not what it learns; and no step waits for the device."""

import json
import platform
from pathlib import Path

import pytest
import torch
from torch import _inductor as inductor
from torch import nn

import pruning
from distill import DISTILLERS
from models import MODELS, build_model
from models.cifar_resnet import CifarResNet
from models.network_file import describe_network
from prune import preparation, record
from prune.criteria import CRITERIA
from prune.schedule import HardPruning, PhysicalPruning
from prune.settings import SOFT_CRITERIA
from utils import cli, profile
from utils.checkpoints import save_checkpoint
from utils.errors import UserError
from utils.images.batches import ImageData
from utils.images.datasets import load_dataset
from utils.training.step import amp_remarks, check_acceleration
from utils.training.trainer import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LOSSES = ("none", *DISTILLERS)
HARD = [("--prune-mode", name, *(["--samp-batches", "1"] if entry.looks_at_images else [])) for name, entry in CRITERIA.items()]
SOFT = [("--prune-mode", criterion, "--soft-prune") for criterion in SOFT_CRITERIA]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class OneBlock(CifarResNet):
    """As little of a ResNet as needs every kind of step, for a compiler takes long over each of them."""

    def __init__(self, *, num_classes):
        super().__init__(depth=8, num_classes=num_classes)
        self.stage_2 = self.stage_3 = nn.Sequential()
        self.classifier = nn.Linear(16, num_classes)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A small network, and no latencies at the end of a run."""
    monkeypatch.setitem(MODELS, "one-block", OneBlock)
    monkeypatch.setattr(profile, "MIN_RUN_SECONDS", 0.001)


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(4)
    network = build_model("one-block", num_classes=10)
    with torch.no_grad():  # running statistics that fit the weights, or its features are no features
        network(next(digits(CPU).train_batches(0)).images)
    path = tmp_path / "teacher.pt"
    save_checkpoint(path, describe_network(network.state_dict(), model="one-block", num_classes=10, config={}))
    return path


def digits(device, *, batch_size=16):
    return ImageData(load_dataset("digits"), batch_size=batch_size, seed=1, device=device, limit_batches=2)


def train(teacher, name, *flags, device="cpu"):
    """Runs `pruning.py` for an epoch of two steps; gives the mean training loss of each term and the test loss."""
    saves = teacher.parent / "saves"
    networks = ["--t-model", "one-block", "--t-path", str(teacher), "--s-copy-t", "--prune-rates", "0.6"]
    size = ["--n-epochs", "1", "--batch-size", "16", "--limit-batches", "2", "--workers", "0", "--schedule", "--lr-drops"]
    place = ["--device", device, "--save-dir", str(saves), "--run-name", name]
    options = ["--hap-ts", "1"] if "hap" in flags else []
    pruning.main(cli.parse_flags(pruning.get_args_parser(), [*networks, *options, *size, *place, *flags]))
    train, test = (json.loads(line) for line in (saves / name / "metrics.jsonl").read_text().splitlines())
    terms = {term: value for term, value in train.items() if term in ("loss", "ce", *DISTILLERS)}
    return {**terms, "test loss": test["loss"]}


@pytest.mark.parametrize("form", ["masked", "compact"])
def test_amp_trains_in_bfloat16_and_stays_close(teacher, form):
    flags = ("--prune-mode", "filter-nggm", "--samp-batches", "1", "--distill", "hap", "--train-form", form)
    exact, reduced = train(teacher, "float32", *flags), train(teacher, "amp", *flags, "--amp")
    assert reduced == pytest.approx(exact, rel=0.1)
    assert reduced["ce"] != pytest.approx(exact["ce"], rel=1e-6)


@pytest.mark.parametrize(("flags", "form"), [([], PhysicalPruning), (["--amp"], HardPruning), (["--compile"], HardPruning)])
def test_a_cpu_trains_the_form_that_is_faster_there(teacher, monkeypatch, flags, form):
    made = []
    build = preparation.build_schedule
    monkeypatch.setattr(preparation, "build_schedule", lambda *args, **options: made.append(build(*args, **options)) or made[-1])
    train(teacher, "run", "--prune-mode", "filter-gm", *flags)
    assert [type(schedule) for schedule in made] == [form]


class TwoFaced(OneBlock):
    """Its training is not its evaluation, which no small form can follow."""

    def forward(self, x):
        return super().forward(x) * 2 if self.training else super().forward(x)


def test_a_network_without_a_small_form_is_trained_with_zeros(teacher, monkeypatch):
    monkeypatch.setitem(MODELS, "one-block", TwoFaced)
    train(teacher, "auto", "--prune-mode", "filter-gm")
    log = (teacher.parent / "saves" / "pruning.txt").read_text()
    assert log.count("WARNING: trains the large network with zeros, not the small one: TwoFaced runs other operations") == 1
    for flags in (["--train-form", "compact"], ["--train-form", "compact", "--dry-run"]):
        with pytest.raises(UserError, match="form compact: TwoFaced runs other operations in training"):
            train(teacher, "compact", "--prune-mode", "filter-gm", *flags)
    assert not (teacher.parent / "saves" / "compact").exists()


def test_a_run_without_a_compact_network_has_a_summary(teacher, monkeypatch):
    def refuse(network, images):
        raise UserError("no way")

    monkeypatch.setattr(record, "compact_selection", refuse)
    train(teacher, "run", "--prune-mode", "filter-gm")
    folder = teacher.parent / "saves" / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert "compact" not in summary and summary["kept_filters"] and not (folder / "model_compact.pt").exists()
    assert "WARNING: no compact network is written: no way" in (teacher.parent / "saves" / "pruning.txt").read_text()


@pytest.mark.parametrize("form", ["masked", "compact"])
def test_compiled_training_stays_close(teacher, form):
    torch.compiler.reset()
    flags = ("--prune-mode", "filter-gm", "--distill", "hap", "--train-form", form)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    eager, compiled = train(teacher, "eager", *flags), train(teacher, "compiled", *flags, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled == pytest.approx(eager, rel=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("switch", ["--amp", "--compile"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pruning_flags", [*HARD, *SOFT], ids=" ".join)
def test_every_prune_mode_with_every_loss(teacher, pruning_flags, loss, switch):
    torch.compiler.reset()
    flags = (*pruning_flags, "--distill", loss)
    tolerance = 0.2 if switch == "--amp" else 1e-3
    assert train(teacher, "fast", *flags, switch) == pytest.approx(train(teacher, "plain", *flags), rel=tolerance)


@pytest.mark.parametrize("form", ["masked", "compact"])
def test_hard_pruned_filters_stay_zero_in_bfloat16(teacher, form):
    train(teacher, form, "--prune-mode", "filter-gm", "--train-form", form, "--amp")
    folder = teacher.parent / "saves" / form
    state = torch.load(folder / "model_last.pt")["state_dict"]
    for name, layer in json.loads((folder / "kept_filters.json").read_text()).items():
        pruned = sorted(set(range(layer["filters"])) - set(layer["kept"]))
        assert len(pruned) == layer["filters"] - round(0.6 * layer["filters"])
        assert state[f"{name}.weight"][pruned].eq(0).all()


# ---- switches that cannot be followed ------------------------------------------------------------------------------------


def refusal(**switches):
    with pytest.raises(UserError) as caught:
        check_acceleration(**{"device": CPU, "amp": False, "compiled": False, "sync_bn": False, **switches})
    return str(caught.value)


def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setattr(inductor.config.cpp, "cxx", ("no-such-compiler",))
    assert refusal(compiled=True).startswith("compile: no C++ compiler was found")


def test_amp_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    assert refusal(device=CUDA, amp=True) == "amp: GTX 1080 has no bfloat16; leave it out"


def test_sync_bn_without_cuda():
    assert refusal(sync_bn=True).startswith("sync_bn: needs CUDA devices")


# ---- on a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pruning_flags", [HARD[-1], SOFT[0]], ids=" ".join)
def test_no_step_waits_for_the_device(teacher, monkeypatch, pruning_flags, loss):
    ordinary, watched_steps = Trainer._train_step, []

    def watched(trainer, batch):
        torch.cuda.set_sync_debug_mode("error" if trainer.batch else "default")  # the first step chooses kernels
        try:
            ordinary(trainer, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        watched_steps.append(trainer.batch)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    train(teacher, "watched", *pruning_flags, "--distill", loss, device="cuda")
    assert watched_steps == [0, 1]


@pytest.mark.gpu
@needs_cuda
def test_batches_are_made_on_the_device():
    data = digits(CUDA)
    batches = data.train_batches(0)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, labels, *_ = next(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert images.device == labels.device == CUDA
    expected = [batch.images for batch in digits(CPU).train_batches(0)][1]
    torch.testing.assert_close(images.cpu(), expected)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("switches", [("--amp",), ("--compile",), ("--amp", "--compile")], ids=" ".join)
def test_switches_on_a_gpu(teacher, switches):
    flags = ("--prune-mode", "filter-nggm", "--samp-batches", "1", "--distill", "hap")
    plain = train(teacher, "plain", *flags, device="cuda")
    assert train(teacher, "fast", *flags, *switches, device="cuda") == pytest.approx(plain, rel=0.1)


def test_a_processor_without_arithmetic_of_bfloat16_is_named_at_the_start():
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.exists() and platform.machine() == "x86_64" else {"avx512_bf16"}
    device, has = torch.device("cpu"), bool(flags & {"avx512_bf16", "amx_tile"})
    assert amp_remarks(device, amp=False) == [] and amp_remarks(torch.device("cuda", 0), amp=True) == []
    found = amp_remarks(device, amp=True)
    assert found == [] if has else found[0].startswith("--amp: this processor has no arithmetic of bfloat16")
