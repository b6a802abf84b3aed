"""A file of a network for other classes gives everything but the classifier, and one line says so."""

from pathlib import Path

import pytest
import torch

from models import build_model
from models.network_file import describe_network, load_network
from utils.checkpoints import save_checkpoint
from utils.images.spec import ImageSpec

FEW = ["--dataset", "digits", "--limit-batches", "1", "--batch-size", "16", "--n-epochs", "1"]
SHORT = [*FEW, "--lr", "1e-12", "--weight-decay", "0", "--schedule", "--lr-drops"]
SAID = "everything was taken but classifier.weight, classifier.bias: it has 7 classes, not 10"
IMAGES = ImageSpec(tuple("abcdefg"), (32, 32), (0.2, 0.2, 0.2), (0.3, 0.3, 0.3))


@pytest.fixture(scope="module")
def other_classes(tmp_path_factory) -> Path:
    """A ResNet-8 for seven classes of images with a normalisation of their own."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("other") / "other.pt"
    state = build_model("resnet8", num_classes=7).state_dict()
    save_checkpoint(path, describe_network(state, model="resnet8", num_classes=7, config={}, images=IMAGES))
    return path


def check_taken(run: Path, path: Path) -> None:
    """The convolutions of the run, whose steps change nothing, are those of the file, and it has ten classes."""
    begun, ended = (load_network(file, flag="--load-path") for file in (path, run / "model_last.pt"))
    assert (ended.num_classes, ended.images.mean, len(ended.images.class_names)) == (10, IMAGES.mean, 10)
    for name, value in begun.network.named_parameters():
        if "classifier" not in name:
            assert torch.allclose(value, ended.network.get_parameter(name), atol=1e-6), name


def test_training_goes_on_for_other_classes(other_classes, tmp_path, run_script):
    words = ["--load-path", str(other_classes), *SHORT, "--save-dir", str(tmp_path), "--run-name", "a"]
    ended = run_script("initial_train", *words)
    assert ended.status == 0, ended.errors
    assert f"WARNING: --load-path {other_classes}: {SAID}\n" in ended.output
    check_taken(tmp_path / "a", other_classes)


def test_a_bare_file_for_other_classes(tmp_path, run_script):
    path, state = tmp_path / "bare.pt", build_model("resnet8", num_classes=7).state_dict()
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, path)
    ended = run_script("initial_train", "--model", "resnet8", "--load-path", str(path), *SHORT, "--dry-run")
    assert ended.status == 0, ended.errors
    assert f"--load-path {path}: took {len(state)} tensors: model, names without module.; {SAID}" in ended.output


def test_scoring_needs_the_classes_of_the_data(other_classes, run_script):
    ended = run_script("initial_train", "--evaluate", "--load-path", str(other_classes), "--dataset", "digits")
    assert ended.status == 2
    assert f"--load-path {other_classes}: has 7 classes, but --dataset digits has 10" in ended.errors


def test_a_copy_of_a_teacher_of_other_classes_is_pruned(other_classes, tmp_path, run_script):
    words = ["--t-path", str(other_classes), "--s-copy-t", *SHORT, "--prune-rates", "0.5", "--distill", "at", "--alpha", "0"]
    ended = run_script("pruning", *words, "--save-dir", str(tmp_path), "--run-name", "a")
    assert ended.status == 0, ended.errors
    assert f"WARNING: --t-path {other_classes}: {SAID}\n" in ended.output
    assert load_network(tmp_path / "a" / "model_last.pt", flag="--t-path").num_classes == 10


@pytest.mark.parametrize(
    ("losses", "named"), [(["hap"], "--alpha 0.9"), (["kd"], "--distill kd"), (["dkd", "at"], "--distill dkd")]
)
def test_logits_of_a_new_classifier_teach_nothing(losses, named, other_classes, run_script):
    words = ["--t-path", str(other_classes), "--s-copy-t", *SHORT, "--prune-rates", "0.5", "--distill", *losses, "--dry-run"]
    ended = run_script("pruning", *words)
    assert ended.status == 2
    assert f"{named}: the teacher was trained for other classes" in ended.errors
