"""predict.py from its command line: the same classes from a checkpoint, an archive and an ONNX file, and what it refuses."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from models.network_file import load_network
from quantize.archive import save_archive
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.images.dataset import Wanted
from utils.images.datasets import load_dataset


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of five digits, two of them in a folder below."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "below").mkdir()
    digits = load_dataset("digits").test
    for index in range(5):
        place = folder / "below" if index > 2 else folder
        Image.fromarray(digits.images[index].permute(1, 2, 0).numpy()).save(place / f"{index}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def files(trained_run, tmp_path_factory, run_script):
    """The same network as a checkpoint, an archive and an ONNX file."""
    folder = tmp_path_factory.mktemp("networks")
    checkpoint = trained_run / "model_best.pt"
    file = load_network(checkpoint, flag="--load-path")
    save_archive(folder / "model.huff", file.network, model=file.model, num_classes=file.num_classes, images=file.images)
    paths = {"checkpoint": checkpoint, "archive": folder / "model.huff"}
    onnx = folder / "model.onnx"
    flags = ("--limit-batches", "1", "--batch-size", "8")
    if run_script("export", "--load-path", str(checkpoint), "--output", str(onnx), *flags).status == 0:
        paths["onnx"] = onnx
    return paths


def expected_classes(checkpoint):
    file = load_network(checkpoint, flag="--load-path")
    digits = load_dataset("digits", wanted=Wanted(normalisation=file.images.normalisation))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in file.images.normalisation)
    with torch.no_grad():
        shares = file.network((digits.test.images[:5] / 255 - mean) / std).softmax(1)
    return [(file.images.class_names[int(row.argmax())], float(row.max())) for row in shares]


@pytest.mark.parametrize("kind", ["checkpoint", "archive", "onnx"])
def test_each_file_names_the_same_classes(kind, files, images, run_script, tmp_path):
    if kind not in files:
        pytest.skip("ONNX is not installed")
    output = tmp_path / "classes.csv"
    ended = run_script("predict", "--load-path", str(files[kind]), str(images), "--top", "3", "--output", str(output))
    assert ended.status == 0, ended.errors
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [
        str(images / name) for name in ("0.png", "1.png", "2.png", "below/3.png", "below/4.png")
    ]
    for row, (name, share) in zip(rows, expected_classes(files["checkpoint"]), strict=True):
        assert row["class_1"] == name and float(row["probability_1"]) == pytest.approx(share, abs=1e-4)
        shares = [float(row[f"probability_{place}"]) for place in (1, 2, 3)]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1.00001


def test_lines_name_image_class_and_probability(files, images, run_script):
    ended = run_script("predict", "--load-path", str(files["checkpoint"]), str(images / "1.png"), str(images / "below"))
    assert ended.status == 0, ended.errors
    expected = expected_classes(files["checkpoint"])
    lines = ended.output.splitlines()
    assert len(lines) == 3
    name, share = expected[1]
    assert lines[0] == f"{images / '1.png'}: {name} {100 * share:.2f} %"


def test_images_of_any_size_and_kind_are_taken(files, run_script, tmp_path):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (50, 70), np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(random.integers(0, 256, (16, 16, 4), np.uint8)).save(tmp_path / "clear.png")
    ended = run_script("predict", "--load-path", str(files["checkpoint"]), str(tmp_path))
    assert ended.status == 0 and len(ended.output.splitlines()) == 2


def test_an_unreadable_image_is_named_and_the_others_are_answered(files, images, run_script, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    ended = run_script("predict", "--load-path", str(files["checkpoint"]), str(tmp_path), str(images / "0.png"))
    assert ended.status == 2 and "1 of 2 images could not be read: the image" in ended.errors
    assert len(ended.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--load-path", "{checkpoint}"), "IMAGE: name images, or folders of images"),
        (("{images}",), "--load-path is required"),
        (("--load-path", "{checkpoint}", "{folder}/none.png"), "there is no such file or folder"),
        (("--load-path", "{checkpoint}", "{folder}"), "the folder holds no image"),
        (("--load-path", "{folder}/none.pt", "{images}"), "no such file"),
        (("--load-path", "{folder}/a.pt2", "{images}"), "opening a .pt2 file can run code"),
        (("--load-path", "{checkpoint}", "{images}", "--top", "0"), "1 or more"),
        (("--load-path", "{checkpoint}", "{images}", "--force"), "only with --output"),
        (("--load-path", "{checkpoint}", "{images}", "--output", "{folder}/none/a.csv"), "cannot be written"),
        (("--load-path", "a.onnx", "{images}", "--device", "cpu"), "only with a checkpoint or an archive"),
    ],
)
def test_bad_input_is_one_line(words, message, files, images, run_script, tmp_path):
    words = [word.format(folder=tmp_path, images=images, checkpoint=files["checkpoint"]) for word in words]
    ended = run_script("predict", *words)
    assert ended.status == 2 and ended.output == ""
    assert message in ended.errors and ended.errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_table_is_replaced_only_if_forced(files, images, run_script, tmp_path):
    output = tmp_path / "classes.csv"
    output.write_text("mine")
    words = ("predict", "--load-path", str(files["checkpoint"]), str(images), "--output", str(output))
    ended = run_script(*words)
    assert (ended.status, output.read_text()) == (2, "mine") and "exists" in ended.errors
    assert run_script(*words, "--force").status == 0 and output.read_text().startswith("image,class_1,")


def test_a_file_that_does_not_say_how_images_look_is_refused(files, images, run_script, tmp_path):
    checkpoint = load_checkpoint(files["checkpoint"])
    for name in ("class_names", "image_size", "mean", "std"):
        del checkpoint[name]
    save_checkpoint(tmp_path / "old.pt", checkpoint)
    ended = run_script("predict", "--load-path", str(tmp_path / "old.pt"), str(images))
    assert ended.status == 2 and "does not say how its images must look" in ended.errors


class TestOnnxOfOthers:
    @pytest.fixture
    def write(self, files, tmp_path):
        """Writes the ONNX file with something changed; gives its path."""
        onnx = pytest.importorskip("onnx")
        if "onnx" not in files:
            pytest.skip("ONNX is not installed")

        def write(change):
            model = onnx.load(files["onnx"])
            change(model)
            onnx.save(model, tmp_path / "changed.onnx")
            return str(tmp_path / "changed.onnx")

        return write

    def test_another_producer(self, write, images, run_script):
        path = write(lambda model: setattr(model, "producer_name", "pytorch"))
        assert "was not written by export.py" in run_script("predict", "--load-path", path, str(images)).errors

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("mean", "[0.1, 0.2]", "its mean is [0.1, 0.2], expected 3 numbers"),
            ("class_names", json.dumps(["a", "b"]), "it names 2 classes, but has 10"),
            ("std", "[" * 100_000, "its std is no JSON"),
            ("image_size", "no", "its image_size is no JSON"),
        ],
    )
    def test_forged_metadata(self, name, value, message, write, images, run_script):
        def change(model):
            next(entry for entry in model.metadata_props if entry.key == name).value = value

        ended = run_script("predict", "--load-path", write(change), str(images))
        assert ended.status == 2 and message in ended.errors and ended.errors.count("\n") == 1

    def test_something_else(self, images, run_script, tmp_path):
        pytest.importorskip("onnxruntime")
        (tmp_path / "a.onnx").write_bytes(b"something else")
        ended = run_script("predict", "--load-path", str(tmp_path / "a.onnx"), str(images))
        assert ended.status == 2 and "is no ONNX file that onnxruntime runs" in ended.errors


def test_images_are_brought_to_another_size_for_a_checkpoint_alone(files, images, run_script):
    ended = run_script("predict", "--load-path", str(files["checkpoint"]), "--image-size", "48x40", str(images))
    assert ended.status == 0, ended.errors
    plain = run_script("predict", "--load-path", str(files["checkpoint"]), str(images))
    assert ended.output.count("%") == plain.output.count("%") and ended.output != plain.output
    ended = run_script("predict", "--load-path", str(files["onnx"]), "--image-size", "48", str(images))
    assert ended.status == 2 and "--image-size 48: only with a checkpoint or an archive" in ended.errors
