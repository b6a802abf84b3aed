"""What a network must be given travels with it: its score does not depend on the images that lie beside those it is tested on."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import published_normalisation
from models.network_file import describe_network, load_network
from quantize.archive import read_archive
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.images.loading import load_images
from utils.images.settings import DataSettings
from utils.world import World

SMALL = "--dataset folder --batch-size 4 --workers 0"
SHORT = f"{SMALL} --n-epochs 1 --schedule --lr-drops --device cpu"
LABELS = ("cat", "dog")


def write_set(folder: Path, *, brightness: int = 128) -> Path:
    """Two classes of 16x16 images that can be told apart, the training images around a brightness."""
    random = np.random.default_rng(0)
    for split, middle in (("train", brightness), ("test", 128)):
        for label, name in enumerate(LABELS):
            (folder / split / name).mkdir(parents=True)
            for number in range(6):
                noise = random.normal(middle, 20 + 20 * label, (16, 16, 3))
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory, run_script) -> dict[str, Path]:
    """A set, the same test images beside dark training images, alone, and renamed; a network that was trained on the first."""
    folder = tmp_path_factory.mktemp("values")
    places = {"own": write_set(folder / "own"), "dark": write_set(folder / "dark", brightness=20), "saves": folder / "saves"}
    shutil.copytree(places["own"] / "test", folder / "alone" / "val")
    shutil.copytree(places["own"], folder / "renamed")
    for split in ("train", "test"):
        (folder / "renamed" / split / "dog").rename(folder / "renamed" / split / "wolf")
    words = (
        "--model",
        "resnet8",
        "--data-dir",
        places["own"],
        "--save-dir",
        places["saves"],
        "--run-name",
        "teacher",
        *SHORT.split(),
    )
    ended = run_script("initial_train", *map(str, words))
    assert ended.status == 0, ended.errors
    places |= {"alone": folder / "alone", "renamed": folder / "renamed", "teacher": places["saves"] / "teacher" / "model_best.pt"}
    for name, changes in (("older", None), ("other", {"mean": [0.1, 0.2, 0.3]})):
        places[name] = folder / f"{name}.pt"
        save_checkpoint(places[name], rewritten(places["teacher"], changes))
    places["bare"] = folder / "bare.pt"
    torch.save(load_checkpoint(places["teacher"])["state_dict"], places["bare"])
    return places


def rewritten(path: Path, changes: dict | None) -> dict:
    """The checkpoint as an older version wrote it, or with other values."""
    checkpoint = load_checkpoint(path)
    if changes is None:
        return {name: value for name, value in checkpoint.items() if name not in ("class_names", "image_size", "mean", "std")}
    return {**checkpoint, **changes}


@pytest.fixture
def run(places, run_script, tmp_path):
    """Runs a script on a set of `places`, whose names in braces stand for their paths."""

    def run(script: str, words: str, *, data: str):
        words = words.format(**places, new=tmp_path).split()
        trains = script != "export" and "--evaluate" not in words
        return run_script(script, *words, "--data-dir", str(places[data]), *(SHORT if trains else SMALL).split())

    return run


def score_of(printed: str) -> str:
    return re.search(r": (loss .*)", printed)[1]


class TestScore:
    @pytest.mark.parametrize("data", ["dark", "alone"])
    @pytest.mark.parametrize("script", ["initial_train --load-path", "pruning --s-path", "quantize_encode --load-path"])
    def test_does_not_depend_on_other_images(self, script, data, run):
        script, flag = script.split()
        own, other = (run(script, f"--evaluate {flag} {{teacher}}", data=name) for name in ("own", data))
        assert own.status == other.status == 0, other.errors
        assert own.output == other.output and "WARNING" not in own.output

    def test_of_an_older_file_is_as_it_was_and_says_so_once(self, run):
        """That is, by the training images: other ones make another score."""
        own, dark = (run("initial_train", "--evaluate --load-path {older}", data=name) for name in ("own", "dark"))
        new = run("initial_train", "--evaluate --load-path {teacher}", data="own")
        assert score_of(own.output) == score_of(new.output) != score_of(dark.output)
        assert own.output.count("WARNING") == 1
        assert "does not say which mean and std its images were normalised with: those of --dataset folder" in own.output

    def test_of_others_checkpoints_by_flags(self, places, run):
        spec = load_network(places["teacher"], flag="").images
        values = "--mean {} {} {} --std {} {} {}".format(*spec.mean, *spec.std)
        named = run("initial_train", f"--evaluate --model resnet8 --load-path {{bare}} {values}", data="alone")
        whole = run("initial_train", "--evaluate --load-path {teacher}", data="alone")
        assert named.status == 0 and named.output == whole.output

    def test_images_of_another_size_are_named(self, run, places, image_writer, tmp_path):
        for name in LABELS:
            image_writer(tmp_path / "new" / "test" / name, sizes=(24, 24))
        places["sized"] = tmp_path / "new"
        ended = run("initial_train", "--evaluate --load-path {teacher}", data="sized")
        assert "images of 24x24 are brought to 16x16, what the network was trained on" in ended.output


REFUSED = [
    ("--evaluate --load-path {teacher}", "renamed", ["its 2 classes are cat, dog, those of --dataset folder are cat, wolf"]),
    ("--evaluate --load-path {older}", "alone", ["has no folder train", "--mean and --std"]),
    ("--evaluate --load-path {teacher} --mean 0.1 0.1 0.1 --std 0.2 0.2 0.2", "own", ["--mean", "mean 0.1 0.1 0.1", "{teacher}"]),
    ("--evaluate --load-path {teacher} --mean 0.1 0.1 0.1", "own", ["--mean 0.1 0.1 0.1", "give --std as well"]),
    ("--evaluate --load-path {bare} --model resnet8 --std 0.1 0.1 0.1", "own", ["--std 0.1 0.1 0.1", "give --mean as well"]),
    ("--model resnet8 --mean 124 116 104 --std 58 57 57", "own", ["--mean", "'124'", "scaled to [0, 1]"]),
    ("--model resnet8 --mean 0.5 0.5 0.5 --std 0.2 0.2 0", "own", ["--std", "'0'"]),
    ("--model resnet8 --mean 0.5 --std 0.2 0.2 0.2", "own", ["--mean", "3"]),
    ("--model resnet8 --mean nan 0.5 0.5 --std 0.2 0.2 0.2", "own", ["--mean", "'nan'"]),
    ("--model resnet8", "alone", ["has no folder train", "training needs it"]),
]


@pytest.mark.parametrize(("words", "data", "parts"), REFUSED)
def test_what_contradicts_is_refused_in_one_line(words, data, parts, places, run, tmp_path):
    ended = run("initial_train", f"{words} --save-dir {{new}}/saves", data=data)
    assert ended.status == 2 and ended.errors.count("\n") == 1
    for part in parts:
        assert part.format(**places) in ended.errors
    assert list(tmp_path.iterdir()) == []


PRUNE = "--prune-rates 0.6 --prune-mode filter-a --save-dir {new} --run-name pruned"


def test_a_student_takes_over_what_the_teacher_has_seen(places, run, tmp_path):
    ended = run("pruning", f"--s-copy-t --t-path {{teacher}} {PRUNE}", data="dark")
    assert ended.status == 0, ended.errors
    expected = load_network(places["teacher"], flag="").images
    for name in ("model_best.pt", "model_last.pt", "model_compact.pt"):
        assert load_network(tmp_path / "pruned" / name, flag="").images == expected
    assert "--mean" not in ended.output


def test_teacher_and_student_see_the_same_images(places, run):
    ended = run("pruning", f"--t-path {{teacher}} --s-path {{other}} --distill kd {PRUNE}", data="own")
    assert ended.status == 2
    assert f"--s-path {places['other']}: mean 0.1 0.2 0.3" in ended.errors and "all networks of a run" in ended.errors


def test_a_student_that_says_nothing_is_shown_what_its_teacher_sees(places, run, tmp_path):
    ended = run("pruning", f"--t-path {{teacher}} --s-path {{older}} --distill kd {PRUNE}", data="dark")
    assert ended.status == 0, ended.errors
    assert f"those of --t-path {places['teacher']} are taken" in ended.output
    assert load_network(tmp_path / "pruned" / "model_best.pt", flag="").images == load_network(places["teacher"], flag="").images


def test_archives_and_what_is_decoded_from_them(places, run, run_script, tmp_path):
    expected = load_network(places["teacher"], flag="").images
    ended = run("quantize_encode", "--load-path {teacher} --save-dir {new} --run-name coded --quan-bits 3", data="dark")
    assert ended.status == 0, ended.errors
    archive = tmp_path / "coded" / "model.huff"
    assert read_archive(archive)[1].images == expected
    assert run_script("quantize_encode", "--decode", str(archive), "--output", str(tmp_path / "decoded.pt")).status == 0
    assert load_network(tmp_path / "decoded.pt", flag="").images == expected
    shown = run_script("quantize_encode", "--inspect", str(archive)).output
    assert "16x16" in shown and "classes cat, dog" in shown
    scores = [run("quantize_encode", "--evaluate --load-path {new}/coded/model.huff", data=data) for data in ("own", "alone")]
    assert scores[0].status == 0 and scores[0].output == scores[1].output


def test_a_resumed_run_keeps_its_values(places, run, run_script, tmp_path):
    """Though the training images have become darker meanwhile."""
    shutil.copytree(places["own"], tmp_path / "set")
    places["changing"] = tmp_path / "set"
    assert run("initial_train", "--model resnet8 --save-dir {new} --run-name run", data="changing").status == 0
    shutil.rmtree(tmp_path / "set" / "train")
    shutil.copytree(places["dark"] / "train", tmp_path / "set" / "train")
    again = ("--resume", str(tmp_path / "run"), "--n-epochs", "2")
    refused = run_script("initial_train", *again)
    assert refused.status == 2 and "holds other images (12 train and 12 test) than" in refused.errors
    ended = run_script("initial_train", *again, "--accept-data")
    assert ended.status == 0, ended.errors
    expected = load_network(places["teacher"], flag="").images
    assert load_network(tmp_path / "run" / "model_last.pt", flag="").images == expected


def test_flags_are_recorded_and_hold(places, run, tmp_path):
    words = "--model resnet8 --mean 0.5 0.4 0.3 --std 0.2 0.2 0.1 --save-dir {new} --run-name run"
    assert run("initial_train", words, data="own").status == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["mean"] == [0.5, 0.4, 0.3]
    assert load_network(tmp_path / "run" / "model_last.pt", flag="").images.normalisation == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_exports(form, places, run, tmp_path):
    for package in ("onnxruntime", "onnxscript") if form == "onnx" else ():
        pytest.importorskip(package)
    output = tmp_path / f"small.{form}"
    ended = run("export", f"--load-path {{teacher}} --format {form} --output {{new}}/{output.name}", data="alone")
    assert ended.status == 0, ended.errors
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(output.read_bytes(), providers=["CPUExecutionProvider"])
        found = session.get_modelmeta().custom_metadata_map
    else:
        found = dict.fromkeys(("class_names", "image_size", "mean", "std"), "")
        torch.export.load(output, extra_files=found)
    expected = load_network(places["teacher"], flag="").images.as_fields()
    assert {name: json.loads(found[name]) for name in expected} == expected
    assert expected["class_names"] == list(LABELS) and expected["image_size"] == [16, 16]


def test_a_forged_file_is_refused_in_a_short_line(places, run, tmp_path):
    forged = {**load_checkpoint(places["teacher"]), "std": ["\n" * 10_000] * 3}
    save_checkpoint(tmp_path / "forged.pt", forged)
    ended = run("initial_train", "--evaluate --load-path {new}/forged.pt", data="own")
    assert ended.status == 2 and ended.errors.count("\n") == 1
    assert "its std is" in ended.errors and len(ended.errors) < 500


def test_a_network_of_large_images_is_tested_on_large_ones(places, run, tmp_path):
    """Also where all test images happen to be small: they are brought to the size that it knows."""
    network = load_network(places["teacher"], flag="")
    description = describe_network(network.network.state_dict(), model="resnet8", num_classes=2, config={}, images=network.images)
    save_checkpoint(tmp_path / "large.pt", {**description, "image_size": [224, 224]})
    ended = run("initial_train", "--evaluate --load-path {new}/large.pt --limit-batches 1", data="own")
    assert ended.status == 0 and ended.output.startswith("WARNING: top1 of 4 of 12 test images")


def test_images_are_normalised_as_published_weights_were_trained_unless_flags_say_otherwise():
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert published_normalisation("resnet18") == published_normalisation("torchvision/resnet18") == imagenet
    assert published_normalisation("resnet20") is None
    place = {"seed": 0, "device": torch.device("cpu"), "world": World(), "published": imagenet}
    assert load_images(DataSettings(), **place).dataset.images.normalisation == imagenet
    given = DataSettings(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert load_images(given, **place).dataset.images.normalisation == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
