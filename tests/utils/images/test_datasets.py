"""Datasets by name: what is read, and what is refused before anything else happens."""

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm

from utils.errors import UserError
from utils.images.batches import ImageData
from utils.images.dataset import ImageFiles, SmallImages, Wanted
from utils.images.datasets import DATASETS, load_dataset
from utils.images.decoding import read_image
from utils.images.spec import ImageSpec

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

    def test_empty_class(self, small_images):
        for path in (small_images / "train" / "dog").iterdir():
            path.unlink()
        self.check(small_images, str(small_images / "train" / "dog"), "holds no image")

    def test_no_test_images(self, small_images):
        for path in (small_images / "test").rglob("*.png"):
            path.unlink()
        self.check(small_images, "test holds no image")

    def test_spellings_that_look_the_same(self, small_images):
        (small_images / "train" / "dog").rename(small_images / "train" / "cafe\u0301")
        (small_images / "test" / "dog").rename(small_images / "test" / "caf\u00e9")
        self.check(small_images, r"'cafe\u0301' and 'caf\xe9', which look the same")

    def test_all_broken_images_are_named_at_once(self, small_images):
        places = [small_images / place / "1.png" for place in SPLITS]
        for path in places:
            path.write_bytes(b"")
        self.check(small_images, "2 images cannot be read", *map(str, places[:2]), "--skip-broken")

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
            load_dataset("cifar10", data_dir=archive.parent, wanted=Wanted(download=False))
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


class TestPixels:
    """Every kind of image as RGB of 8 bits, the values worked out by hand."""

    def rgb(self, image: Image.Image, path: Path, **options) -> list[list[int]]:
        image.save(path, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = read_image(str(path))
        assert found.mode == "RGB"
        return np.asarray(found)[0].tolist()

    def grey(self, image: Image.Image, path: Path) -> list[int]:
        pixels = self.rgb(image, path)
        assert all(len(set(pixel)) == 1 for pixel in pixels)
        return [pixel[0] for pixel in pixels]

    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
    def test_16_bits_are_scaled(self, suffix, tmp_path):
        """65535 is white, 257 = 65535 / 255 the darkest grey, and 32896 = 128 * 257 is in the middle."""
        image = Image.fromarray(np.array([[0, 128, 257, 32896, 65535]], np.uint16))
        assert self.grey(image, tmp_path / f"a.{suffix}") == [0, 0, 1, 128, 255]

    def test_16_bits_of_the_other_byte_order(self, tmp_path):
        (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0x80, 0x80, 0xFF, 0xFF]))
        assert np.asarray(read_image(str(tmp_path / "a.pgm")))[0, :, 0].tolist() == [128, 255]

    def test_32_bits_that_hold_16(self, tmp_path):
        assert self.grey(Image.fromarray(np.array([[0, 257, 65535]], np.int32)), tmp_path / "a.tif") == [0, 1, 255]

    def test_floating_point_from_0_to_1(self, tmp_path):
        assert self.grey(Image.fromarray(np.array([[0, 0.2, 1]], np.float32)), tmp_path / "a.tif") == [0, 51, 255]

    @pytest.mark.parametrize(
        "values",
        [np.array([[0, 65536]], np.int32), np.array([[-1, 5]], np.int32), np.array([[0, 1.5]], np.float32)],
    )
    def test_values_of_which_nobody_knows_what_is_white(self, values, tmp_path):
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(UserError, match=r"a\.tif cannot be read \(its grey values go from"):
            read_image(str(tmp_path / "a.tif"))

    def test_not_a_number(self, tmp_path):
        Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(UserError, match="from nan to nan, expected 0 to 1"):
            read_image(str(tmp_path / "a.tif"))

    def test_grey(self, tmp_path):
        assert self.grey(Image.fromarray(np.array([[0, 7, 255]], np.uint8)), tmp_path / "a.png") == [0, 7, 255]

    def test_one_bit(self, tmp_path):
        assert self.grey(Image.fromarray(np.array([[False, True]])), tmp_path / "a.png") == [0, 255]

    def test_grey_below_transparency(self, tmp_path):
        assert self.rgb(Image.new("LA", (1, 1), (77, 0)), tmp_path / "a.png") == [[77, 77, 77]]

    def test_colours_below_transparency(self, tmp_path):
        assert self.rgb(Image.new("RGBA", (1, 1), (7, 8, 9, 0)), tmp_path / "a.png") == [[7, 8, 9]]

    @pytest.mark.parametrize("options", [{}, {"transparency": 1}, {"transparency": bytes([0, 128])}])
    def test_palette(self, options, tmp_path):
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "L")
        image.putpalette([200, 100, 50, 10, 20, 30])
        assert image.mode == "P"
        assert self.rgb(image, tmp_path / "a.png", **options) == [[200, 100, 50], [10, 20, 30]]

    def test_cmyk(self, tmp_path):
        """Full cyan leaves no red; a fifth of black leaves 255 * 0.8 = 204 of the rest."""
        assert self.rgb(Image.new("CMYK", (1, 1), (255, 0, 0, 51)), tmp_path / "a.tif") == [[0, 204, 204]]
        found = self.rgb(Image.new("CMYK", (8, 8), (255, 0, 0, 51)), tmp_path / "a.jpg", quality=100)
        assert np.abs(np.array(found) - [0, 204, 204]).max() <= 2


class TestForANetwork:
    """What a network brings along stands in the place of what lies in the folder."""

    VALUES = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))

    def test_its_normalisation(self, small_images, mixed_size_images):
        for name, folder in (("folder", small_images), ("folder", mixed_size_images), ("imagenet", small_images)):
            dataset = load_dataset(name, data_dir=folder, wanted=Wanted(normalisation=self.VALUES))
            assert (dataset.mean, dataset.std) == self.VALUES == dataset.images.normalisation
        assert load_dataset("digits", wanted=Wanted(normalisation=self.VALUES)).std == self.VALUES[1]

    def test_only_test_images(self, small_images):
        whole = load_dataset("folder", data_dir=small_images)
        shutil.rmtree(small_images / "train")
        dataset = load_dataset("folder", data_dir=small_images, wanted=Wanted(normalisation=self.VALUES, test_only=True))
        assert torch.equal(dataset.test.images, whole.test.images)
        assert len(dataset.train.labels) == 0 and dataset.images.class_names == ("cat", "dog")
        data = ImageData(dataset, batch_size=4, seed=1, device=torch.device("cpu"))
        assert sum(len(batch.labels) for batch in data.test_batches()) == 6

    def test_only_large_test_images(self, tmp_path, mixed_size_images):
        shutil.copytree(mixed_size_images / "test", tmp_path / "test")
        dataset = load_dataset("folder", data_dir=tmp_path, wanted=Wanted(normalisation=self.VALUES, test_only=True))
        data = ImageData(dataset, batch_size=4, seed=1, device=torch.device("cpu"))
        assert data.example.shape == (6, 3, 224, 224)

    def test_what_is_asked_where_nothing_says_the_normalisation(self, small_images):
        shutil.rmtree(small_images / "train")
        with pytest.raises(UserError, match="no folder train beside test: give --mean and --std"):
            load_dataset("folder", data_dir=small_images, wanted=Wanted(test_only=True))
        with pytest.raises(UserError, match="no folder train beside test: training needs it"):
            load_dataset("folder", data_dir=small_images, wanted=Wanted(normalisation=self.VALUES))

    def test_its_image_size_says_whether_it_saw_crops(self, small_images):
        for side in (12, 224):
            wanted = Wanted(network=ImageSpec(("cat", "dog"), (side, side), *self.VALUES))
            assert load_dataset("folder", data_dir=small_images, wanted=wanted).images.image_size == (side, side)

    def test_sizes_of_training_images_do_not_matter_to_the_test(self, small_images, image_writer):
        image_writer(small_images / "train" / "cat" / "large", sizes=(90,))
        assert load_dataset("folder", data_dir=small_images).streamed
        network = ImageSpec(("cat", "dog"), (12, 12), *self.VALUES)
        wanted = Wanted(network=network, normalisation=self.VALUES, test_only=True)
        assert load_dataset("folder", data_dir=small_images, wanted=wanted).images.image_size == (12, 12)

    def test_a_class_that_is_called_by_no_text(self, small_images):
        for split in ("train", "test"):
            (small_images / split / "dog").rename(os.fsdecode(os.fsencode(small_images / split) + b"/d\xf6g"))
        assert load_dataset("folder", data_dir=small_images).classes == ("cat", "d\\xf6g")


@pytest.mark.parametrize("sizes", [[32], [32, 100]], ids=["decoded", "checked"])
def test_reading_many_files_shows_a_bar(tmp_path, image_writer, monkeypatch, sizes):
    for part in SPLITS:
        image_writer(tmp_path / part, sizes=sizes)
    screen, shown = io.StringIO(), {"disable": False, "delay": 0, "mininterval": 0, "miniters": 1}
    monkeypatch.setattr("utils.images.image_folders.tqdm", lambda **options: tqdm(**options | shown, file=screen))
    load_dataset("folder", data_dir=tmp_path)
    expected = ("reading images: 100%", "2/2") if sizes == [32] else ("checking images: 100%", "8/8")
    assert all(text in screen.getvalue() for text in expected)
