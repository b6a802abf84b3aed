"""Datasets by name: what is read, and what is refused before anything else happens."""

import hashlib
import io
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from utils.data import ImageData
from utils.datasets import DATASETS, ImageFiles, SmallImages, load_dataset
from utils.errors import UserError

SPLITS = ("train/cat", "train/dog", "test/cat", "test/dog")


@pytest.fixture
def small_images(tmp_path, image_writer) -> Path:
    """Two classes of three 12x12 images in each split."""
    for number, place in enumerate(SPLITS):
        image_writer(tmp_path / "set" / place, sizes=(12, 12, 12), seed=number)
    return tmp_path / "set"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=f"--dataset mnist: unknown, choose from {', '.join(DATASETS)}"):
        load_dataset("mnist")


class TestDigits:
    def test_is_every_digit_once(self):
        dataset = load_dataset("digits")
        labels = torch.cat([dataset.train.labels, dataset.test.labels])
        assert (len(dataset.train.labels), len(dataset.test.labels)) == (1437, 360)
        assert torch.equal(labels.bincount(), torch.from_numpy(np.bincount(load_digits().target)))
        images = torch.cat([dataset.train.images, dataset.test.images])
        assert images.shape == (1797, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert len(images.flatten(1).unique(dim=0)) == len(np.unique(load_digits().images, axis=0))

    def test_is_grey_and_never_mirrored(self):
        dataset = load_dataset("digits")
        assert torch.equal(dataset.train.images[:, 0], dataset.train.images[:, 2])
        assert not dataset.flip

    def test_split_is_always_the_same_and_even(self):
        first, second = load_dataset("digits"), load_dataset("digits")
        assert torch.equal(first.test.images, second.test.images)
        assert first.test.labels.bincount().min() >= 34

    def test_normalisation_is_that_of_the_training_images(self):
        dataset = load_dataset("digits")
        pixels = dataset.train.images.numpy() / 255
        assert dataset.mean == pytest.approx(pixels.mean((0, 2, 3)))
        assert dataset.std == pytest.approx(pixels.std((0, 2, 3)))


class TestFolder:
    def test_small_images_are_read_into_memory(self, small_images):
        dataset = load_dataset("folder", data_dir=small_images)
        assert isinstance(dataset.train, SmallImages)
        assert dataset.classes == ("cat", "dog")
        assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        expected = np.random.default_rng(1).integers(0, 256, (12, 12, 3), np.uint8)  # the first of train/dog
        assert np.array_equal(dataset.train.images[3].permute(1, 2, 0).numpy(), expected)
        assert dataset.mean == pytest.approx((dataset.train.images.numpy() / 255).mean((0, 2, 3)))

    @pytest.mark.parametrize("name", ["val", "valid"])
    def test_other_names_of_the_test_split(self, name, small_images):
        (small_images / "test").rename(small_images / name)
        assert len(load_dataset("folder", data_dir=small_images).test.labels) == 6

    def test_test_is_preferred_to_valid(self, small_images, image_writer):
        for label in ("cat", "dog"):
            image_writer(small_images / "valid" / label, sizes=(12,))
        assert len(load_dataset("cinic10", data_dir=small_images).test.labels) == 6

    def test_images_of_mixed_sizes_are_streamed(self, mixed_size_images):
        dataset = load_dataset("folder", data_dir=mixed_size_images)
        assert isinstance(dataset.train, ImageFiles)
        assert len(dataset.train.paths) == 6
        assert all(0.3 < value < 0.7 for value in dataset.mean)

    def test_large_images_are_streamed(self, tmp_path, image_writer):
        for place in SPLITS:
            image_writer(tmp_path / place, sizes=(65,))
        assert load_dataset("folder", data_dir=tmp_path).streamed

    def test_imagenet_has_its_published_normalisation(self, small_images):
        dataset = load_dataset("imagenet", data_dir=small_images)
        assert dataset.streamed
        assert dataset.mean == (0.485, 0.456, 0.406)

    def test_other_files_are_passed_over(self, small_images):
        (small_images / "train" / "cat" / "notes.txt").write_text("nothing")
        (small_images / "train" / "readme.md").write_text("nothing")
        assert len(load_dataset("folder", data_dir=small_images).train.labels) == 6


class TestRefused:
    def check(self, folder: Path, *parts: str) -> None:
        with pytest.raises(UserError) as raised:
            load_dataset("folder", data_dir=folder)
        for part in ("--data-dir", *parts):
            assert part in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_missing_folder(self, tmp_path):
        self.check(tmp_path / "gone", str(tmp_path / "gone"), "no such folder")

    def test_missing_split(self, small_images):
        shutil.rmtree(small_images / "test")
        self.check(small_images, "needs the folders train and test")

    def test_no_classes(self, small_images):
        for label in ("cat", "dog"):
            shutil.rmtree(small_images / "train" / label)
        self.check(small_images, str(small_images / "train"), "no class folders")

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_empty_class(self, split, small_images):
        for path in (small_images / split / "dog").iterdir():
            path.unlink()
        self.check(small_images, str(small_images / split / "dog"), "holds no image")

    def test_classes_that_differ(self, small_images):
        (small_images / "test" / "dog").rename(small_images / "test" / "wolf")
        self.check(small_images, "train and test have different class folders")

    @pytest.mark.parametrize("damage", ["text", "half", "empty"])
    @pytest.mark.parametrize("place", SPLITS)
    def test_unreadable_small_image(self, place, damage, small_images):
        path = small_images / place / "2.png"
        content = {"text": b"no image", "half": path.read_bytes()[:150], "empty": b""}[damage]
        path.write_bytes(content)
        self.check(small_images, str(path), "cannot be read")

    @pytest.mark.parametrize("place", SPLITS)
    def test_unreadable_streamed_image(self, place, tmp_path, mixed_size_images):
        shutil.copytree(mixed_size_images, tmp_path / "set")
        path = tmp_path / "set" / place / "1.png"
        path.write_bytes(path.read_bytes()[:1000])
        self.check(tmp_path / "set", str(path), "cannot be read")

    @pytest.mark.parametrize("workers", [0, 1])
    def test_image_that_breaks_while_it_is_trained_on(self, workers, tmp_path, mixed_size_images):
        shutil.copytree(mixed_size_images, tmp_path / "set")
        dataset = load_dataset("folder", data_dir=tmp_path / "set")
        data = ImageData(dataset, batch_size=4, seed=1, device=torch.device("cpu"), workers=workers)
        for path in (tmp_path / "set" / "train" / "dog").iterdir():
            path.write_bytes(b"gone")
        with pytest.raises(UserError, match=r"^--data-dir: the image .*dog/\d\.png cannot be read") as raised:
            list(data.train_batches(0))
        assert "Traceback" not in str(raised.value)


class TestCifar:
    """A tiny archive in CIFAR-10's format, with its own checksums in place of the published ones."""

    @pytest.fixture
    def archive(self, tmp_path, monkeypatch) -> Path:
        random = np.random.default_rng(0)
        contents = {name: _batch(random) for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")}
        contents["batches.meta"] = pickle.dumps({"label_names": [f"class{label}" for label in range(10)]})
        path = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, content in contents.items():
                entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        checksums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
        reader = torchvision.datasets.CIFAR10
        monkeypatch.setattr(reader, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
        monkeypatch.setattr(reader, "train_list", [[f"data_batch_{n}", checksums[f"data_batch_{n}"]] for n in range(1, 6)])
        monkeypatch.setattr(reader, "test_list", [["test_batch", checksums["test_batch"]]])
        monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": checksums["batches.meta"]})
        return path

    def test_is_read_from_the_archive_as_published(self, archive, capsys):
        dataset = load_dataset("cifar10", data_dir=archive.parent)
        assert dataset.train.images.shape == (20, 3, 32, 32)
        assert dataset.test.labels.tolist() == [0, 1, 2, 3]
        assert dataset.classes[3] == "class3"
        assert dataset.flip
        first = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)[0]
        assert torch.equal(dataset.train.images[0].flatten(), torch.from_numpy(first))
        assert capsys.readouterr().out == ""

    def test_damaged_files_name_folder_and_archive(self, archive):
        load_dataset("cifar10", data_dir=archive.parent)
        (archive.parent / "cifar-10-batches-py" / "test_batch").write_bytes(b"damaged")
        with pytest.raises(UserError) as raised:
            load_dataset("cifar10", data_dir=archive.parent, download=False)
        for part in ("--dataset cifar10", str(archive), str(archive.parent / "cifar-10-batches-py"), "--data-dir"):
            assert part in str(raised.value)

    def test_missing_files_without_a_network(self, tmp_path, monkeypatch):
        def offline(*args, **keywords):
            raise OSError("Name or service not known")

        monkeypatch.setattr("urllib.request.urlopen", offline)
        with pytest.raises(UserError) as raised:
            load_dataset("cifar100", data_dir=tmp_path)
        assert "Name or service not known" in str(raised.value)
        assert str(tmp_path / "cifar-100-python.tar.gz") in str(raised.value)


def _batch(random: np.random.Generator) -> bytes:
    return pickle.dumps({"data": random.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 3]})
