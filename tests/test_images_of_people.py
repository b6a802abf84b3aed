"""Sets of images as people have them, through the flags of the scripts, and what a run keeps in mind of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from reporting.gather import gather
from reporting.tables import notes
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.images.loading import load_images
from utils.images.settings import DataSettings
from utils.world import World

WORDS = "--dataset folder --batch-size 4 --workers 0 --n-epochs 1 --schedule --lr-drops --device cpu --model resnet20"


@pytest.fixture
def train(run_script, tmp_path):
    """Trains for an epoch on a folder below tmp_path; gives how it ended, and the run's folder."""

    def train(data, *words, name="run"):
        place = ("--data-dir", str(tmp_path / data), "--save-dir", str(tmp_path / "saves"), "--run-name", name)
        return run_script("initial_train", *WORDS.split(), *place, *words), tmp_path / "saves" / name

    return train


@pytest.fixture
def folder(tmp_path, image_writer) -> Path:
    """Two classes of three 12x12 images in each split."""
    for number, place in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        image_writer(tmp_path / "set" / place, sizes=(12, 12, 12), seed=number)
    return tmp_path / "set"


def config_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def test_a_share_for_testing_is_recorded_file_by_file(folder, train):
    shutil.rmtree(folder / "test")
    (folder / "train").rename(folder.parent / "plain")
    ended, run = train("plain", "--test-share", "0.34")
    assert ended.status == 0, ended.errors
    images = config_of(run)["images"]
    assert (images["train"], images["test"], len(images["test_files"])) == (4, 2, 2)
    assert all((folder.parent / "plain" / path).is_file() for path in images["test_files"])


def test_broken_images_are_left_out_and_recorded(folder, train):
    (folder / "train" / "cat" / "1.png").write_bytes(b"")
    refused, _ = train("set")
    assert refused.status == 2 and "cat/1.png cannot be read" in refused.errors
    ended, run = train("set", "--skip-broken")
    assert ended.status == 0 and "WARNING: 1 broken images are left out: " in ended.output
    assert config_of(run)["images"]["left_out_broken"] == ["train/cat/1.png"]


def test_a_size_travels_with_the_network_and_the_plan_says_why(folder, train, run_script, tmp_path):
    Image.new("RGB", (13, 12)).save(folder / "train" / "cat" / "0.png")
    plan, _ = train("set", "--dry-run")
    assert "image size: 224x224, the images have several sizes" in plan.output
    ended, run = train("set", "--image-size", "16x24")
    assert ended.status == 0, ended.errors
    assert load_checkpoint(run / "model_best.pt")["image_size"] == [16, 24]
    plan, _ = train("set", "--image-size", "16", "--dry-run", name="other")
    assert "image size: 16x16, as --image-size says" in plan.output
    scored = run_script("initial_train", "--evaluate", "--load-path", str(run / "model_best.pt"), "--dataset", "folder",
                        "--data-dir", str(folder), "--workers", "0", "--batch-size", "4")  # fmt: skip
    assert scored.status == 0 and "are brought to 24x16, what the network was trained on" in scored.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--image-size", "0"), "--image-size: '0' is not a size in pixels, N or HxW"),
        (("--image-size", "32x"), "--image-size: '32x' is not a size"),
        (("--image-size", "5000"), "each at most 4096"),
        (("--test-share", "1"), "--test-share: '1' is not a share above 0 and below 1"),
        (("--test-share", "0.2"), "has a split of its own, the folder test"),
        (("--accept-data",), "--accept-data: only with --resume"),
        (("--dataset", "digits", "--skip-broken"), "--skip-broken: only with --dataset"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, folder, train):
    ended, run = train("set", *words)
    assert (ended.status, ended.output) == (2, "") and message in ended.errors and ended.errors.count("\n") == 1
    assert not run.exists()


@pytest.mark.parametrize("no_flip", [False, True])
def test_nothing_is_mirrored_where_left_and_right_mean_something(no_flip, folder):
    """Without a frame to crop from, what is trained on is an image or its mirror."""
    settings = DataSettings("folder", str(folder), batch_size=2, mean=(0.0,) * 3, std=(1.0,) * 3, crop_padding=0, no_flip=no_flip)
    data = load_images(settings, seed=1, device=torch.device("cpu"), world=World())
    shown = torch.cat([batch.images for epoch in range(3) for batch in data.train_batches(epoch)])
    own = data.dataset.train.images / 255
    as_they_are = [any(torch.allclose(image, each, atol=1e-6) for each in own) for image in shown]
    assert all(as_they_are) == no_flip


def test_a_limited_test_is_said_to_be_one(folder, train):
    ended, run = train("set", "--limit-batches", "1")
    assert "top1 of 4 of 6 test images" in ended.output
    assert "top1 of 4 of 6 test images" in (run.parent / "initial_train.txt").read_text()
    assert json.loads((run / "summary.json").read_text())["test_images"] == {"shown": 4, "all": 6}
    assert notes(gather([run]).groups)[-1].endswith(": top1 of 4 of 6 test images")


class TestResumed:
    @pytest.fixture
    def tuned(self, folder, train, tmp_path):
        """A run that was fine-tuned from the file mine.pt."""
        ended, run = train("set", name="teacher")
        assert ended.status == 0, ended.errors
        shutil.copy(run / "model_best.pt", tmp_path / "mine.pt")
        ended, run = train("set", "--load-path", str(tmp_path / "mine.pt"), name="tuned")
        assert ended.status == 0, ended.errors
        return run

    def test_a_complete_run_is_left_as_it_is(self, tuned, run_script):
        before = {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}
        ended = run_script("initial_train", "--resume", str(tuned))
        assert ended.status == 0 and "complete, nothing was changed; --n-epochs above 1 continues it" in ended.output
        assert {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()} == before

    def test_a_network_that_was_moved_is_proved_by_its_weights(self, tuned, run_script, tmp_path):
        (tmp_path / "mine.pt").rename(tmp_path / "moved.pt")
        again = ("--resume", str(tuned), "--n-epochs", "2")
        assert "no such file" in run_script("initial_train", *again).errors
        other = load_checkpoint(tmp_path / "moved.pt")
        other["state_dict"] = {name: torch.zeros_like(value) for name, value in other["state_dict"].items()}
        save_checkpoint(tmp_path / "other.pt", other)
        refused = run_script("initial_train", *again, "--load-path", str(tmp_path / "other.pt"))
        assert refused.status == 2 and "holds other weights than when" in refused.errors
        ended = run_script("initial_train", *again, "--load-path", str(tmp_path / "moved.pt"))
        assert ended.status == 0, ended.errors
        config = config_of(tuned)
        assert config["flags"]["load_path"] == str(tmp_path / "moved.pt")
        assert [(entry["epoch"], entry["versions"]["torch"]) for entry in config["resumptions"]] == [(1, torch.__version__)]

    def test_another_image_is_noticed(self, tuned, folder, run_script, image_writer):
        image_writer(folder / "train" / "dog" / "new", sizes=(12,))
        again = ("--resume", str(tuned), "--n-epochs", "2")
        refused = run_script("initial_train", *again)
        assert refused.status == 2 and "holds other images (7 train and 6 test) than" in refused.errors
        assert run_script("initial_train", *again, "--accept-data").status == 0
        assert run_script("initial_train", "--resume", str(tuned), "--n-epochs", "3").status == 0
