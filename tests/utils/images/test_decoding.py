"""One image as people have it: turned as it was held, of any depth, broken, or huge."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from utils.errors import UserError
from utils.images.dataset import Wanted
from utils.images.datasets import load_dataset
from utils.images.decoding import BrokenImage, describe_broken, grey_bits_of, image_size, largest_grey, read_image
from utils.images.spec import ImageSpec, read_image_spec

SEEN = np.arange(6, dtype=np.uint8).reshape(2, 3) * 50  # two rows of three
# How a camera stores what is seen, by the EXIF tag that says so (Exif 2.3, table 5)
STORED = {
    1: SEEN,
    2: SEEN[:, ::-1],
    3: SEEN[::-1, ::-1],
    4: SEEN[::-1],
    5: SEEN.T,
    6: np.rot90(SEEN),
    7: np.rot90(SEEN, 2).T,
    8: np.rot90(SEEN, -1),
}


@pytest.mark.parametrize("tag", STORED)
@pytest.mark.parametrize(("ending", "options"), [("png", {}), ("tif", {"compression": "tiff_lzw"})])
def test_photos_are_turned_as_they_are_seen(tag, ending, options, tmp_path):
    path, exif = str(tmp_path / f"a.{ending}"), Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(np.ascontiguousarray(STORED[tag])).save(path, exif=exif, **options)
    assert np.array_equal(np.asarray(read_image(path))[:, :, 0], SEEN)
    assert image_size(path) == (2, 3)


@pytest.mark.parametrize(
    ("highest", "bits"), [(0, None), (1, 8), (255, 8), (256, 10), (1023, 10), (4095, 12), (4096, 14), (16384, 16), (70000, 16)]
)
def test_the_fewest_bits_that_hold_the_largest_number(highest, bits):
    assert grey_bits_of([0, highest]) == bits


@pytest.mark.parametrize(("bits", "white"), [(8, 255), (10, 1023), (12, 4095), (14, 16383), (16, 65535)])
@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_grey_numbers_are_scaled_by_their_bits(bits, white, kind, tmp_path):
    """Black, a fifth of white, and white."""
    path = str(tmp_path / "a.tif")
    Image.fromarray(np.array([[0, white / 5, white]]).round().astype(kind)).save(path)
    assert np.asarray(read_image(path, grey_bits=bits))[0, :, 0].tolist() == [0, 51, 255]
    assert largest_grey(path) == white


def test_other_images_have_no_depth_of_their_own(tmp_path):
    for mode, ending in (("L", "png"), ("RGB", "tif"), ("F", "tif"), ("L", "jpg")):
        path = str(tmp_path / f"{mode}.{ending}")
        Image.new(mode, (2, 2), 1).save(path)
        assert largest_grey(path) == 0


def write_grey(folder, factor, *, classes=("dark", "light")):
    """Pictures of numbers up to 100 times `factor` in 16 bits."""
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = np.full((8, 8), 40 * label + 20 * number + 20, np.uint16) * factor
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def test_a_set_is_scaled_by_the_largest_number_of_its_training_images(tmp_path):
    """Numbers of 8 bits in files of 16 are what they are; times 41 they need 13, so 14, bits."""
    dataset = load_dataset("folder", data_dir=write_grey(tmp_path / "plain", 1))
    assert dataset.grey_bits == dataset.images.grey_bits == 8
    assert sorted(set(dataset.train.images.flatten().tolist())) == [20, 40, 60, 80, 100]
    deep = load_dataset("folder", data_dir=write_grey(tmp_path / "deep", 41))
    assert deep.grey_bits == 14
    assert sorted(set(deep.train.images.flatten().tolist())) == [round(20 * step * 41 * 255 / 16383) for step in range(1, 6)]


def test_a_network_says_what_was_white(tmp_path):
    network = ImageSpec(("dark", "light"), (8, 8), (0.5,) * 3, (0.5,) * 3, 12)
    wanted = Wanted(network=network, normalisation=network.normalisation, test_only=True)
    dataset = load_dataset("folder", data_dir=write_grey(tmp_path / "set", 1), wanted=wanted)
    assert dataset.grey_bits == 12 and dataset.test.images.max() == round(100 * 255 / 4095)


def test_the_depth_travels_with_a_network_and_older_files_mean_16_bits():
    spec = ImageSpec(("a", "b"), (8, 8), (0.5,) * 3, (0.5,) * 3, 12)
    assert read_image_spec(spec.as_fields(), num_classes=2) == spec
    older = {name: value for name, value in spec.as_fields().items() if name != "grey_bits"}
    assert read_image_spec(older, num_classes=2).grey_bits == 16
    with pytest.raises(UserError, match="its grey_bits is 11, expected one of 8, 10, 12, 14, 16"):
        read_image_spec({**older, "grey_bits": 11}, num_classes=2)


def test_streamed_images_of_16_bits(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.full((70, 80), 200, np.uint16)).save(tmp_path / split / name / "1.png")
    dataset = load_dataset("folder", data_dir=tmp_path)
    assert dataset.streamed and dataset.grey_bits == 8
    assert dataset.mean == pytest.approx((200 / 255,) * 3)


def test_two_hundred_megapixels_are_read(tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("1", (20_000, 10_000)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(path) == (10_000, 20_000)
        assert read_image(path).size == (20_000, 10_000)


def test_a_picture_without_an_end_is_not(tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("1", (40_000, 14_000)).save(path)
    with pytest.raises(BrokenImage, match="exceeds limit"):
        read_image(path)


def test_many_broken_files_are_one_line():
    errors = [BrokenImage(f"the image {number}.png cannot be read (why)") for number in range(40)]
    line = describe_broken(errors)
    assert line.startswith("40 images cannot be read: the image 0.png") and line.endswith("and 30 more")


class TestSkipBroken:
    @pytest.mark.parametrize("sizes", [(12,) * 4, (30, 80, 90, 100)], ids=["in memory", "streamed"])
    def test_a_set_goes_on_without_them_and_says_so(self, sizes, tmp_path, image_writer):
        for number, place in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
            image_writer(tmp_path / place, sizes=sizes, seed=number)
        whole = load_dataset("folder", data_dir=tmp_path)
        for place in ("train/cat/1.png", "test/dog/3.png"):
            content = (tmp_path / place).read_bytes()
            (tmp_path / place).write_bytes(content[: len(content) // 2])
        dataset = load_dataset("folder", data_dir=tmp_path, wanted=Wanted(skip_broken=True))
        assert dataset.broken == ("test/dog/3.png", "train/cat/1.png")
        assert dataset.train.labels.tolist() == [0] * 3 + [1] * 4 and dataset.test.labels.tolist() == [0] * 4 + [1] * 3
        assert any("2 broken images are left out: " in remark for remark in dataset.remarks)
        if not whole.streamed:
            assert torch.equal(dataset.train.images, whole.train.images[[0, 2, 3, 4, 5, 6, 7]])


class TestSize:
    def test_one_odd_file_is_named_and_a_size_mends_it(self, tmp_path, image_writer):
        for number, place in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
            image_writer(tmp_path / place, sizes=(32, 32), seed=number)
        Image.new("RGB", (33, 32)).save(tmp_path / "train/dog/1.png")
        dataset = load_dataset("folder", data_dir=tmp_path)
        assert dataset.streamed and dataset.image_size == (224, 224)
        assert any("train/dog/1.png 33x32" in remark and "--image-size" in remark for remark in dataset.remarks)
        sized = load_dataset("folder", data_dir=tmp_path, wanted=Wanted(asked_size=(32, 32)))
        assert not sized.streamed and sized.train.images.shape == (4, 3, 32, 32)

    def test_digits_and_large_sizes(self, mixed_size_images):
        assert load_dataset("digits", wanted=Wanted(asked_size=(20, 24))).images.image_size == (20, 24)
        assert load_dataset("folder", data_dir=mixed_size_images, wanted=Wanted(asked_size=(96, 80))).image_size == (96, 80)
        with pytest.raises(UserError, match="--image-size 96x96: images of digits have 32x32, at most 64"):
            load_dataset("digits", wanted=Wanted(asked_size=(96, 96)))


class TestClassesOfTheSplits:
    @pytest.fixture
    def folder(self, tmp_path, image_writer):
        for number, place in enumerate(f"{split}/{name}" for split in ("train", "test") for name in ("bird", "cat", "dog")):
            image_writer(tmp_path / place, sizes=(12, 12), seed=number)
        return tmp_path

    @pytest.mark.parametrize("how", ["lack", "empty"])
    def test_a_class_without_test_images_is_a_warning_and_others_keep_their_numbers(self, how, folder):
        for path in (folder / "test" / "bird").iterdir():
            path.unlink()
        if how == "lack":
            (folder / "test" / "bird").rmdir()
        dataset = load_dataset("folder", data_dir=folder)
        assert dataset.classes == ("bird", "cat", "dog") and dataset.test.labels.tolist() == [1, 1, 2, 2]
        assert any("test has no image of bird: 2 of 3 classes are scored" in remark for remark in dataset.remarks)

    def test_a_network_is_scored_by_the_names_of_its_classes(self, folder):
        network = ImageSpec(("ant", "bird", "cat", "dog"), (12, 12), (0.5,) * 3, (0.5,) * 3)
        wanted = Wanted(network=network, normalisation=network.normalisation, test_only=True)
        dataset = load_dataset("folder", data_dir=folder, wanted=wanted)
        assert dataset.classes == network.class_names and dataset.test.labels.tolist() == [1, 1, 2, 2, 3, 3]

    def test_a_single_class_is_a_warning(self, folder):
        for split in ("train", "test"):
            for name in ("bird", "dog"):
                (folder / split / name).rename(folder / f"{split}-{name}")
        assert any("a single class, cat" in remark for remark in load_dataset("folder", data_dir=folder).remarks)

    def test_a_share_is_drawn_for_testing_and_recorded(self, folder):
        (folder / "test").rename(folder.parent / f"{folder.name}-test")
        dataset = load_dataset("folder", data_dir=folder, wanted=Wanted(test_share=0.5))
        assert dataset.test.labels.tolist() == [0, 1, 2] and len(dataset.test_files) == 3
        assert all((folder / path).is_file() for path in dataset.test_files)
        with pytest.raises(UserError, match=r"--test-share 0\.5: .* has a split of its own, the folder test"):
            (folder / "test").mkdir()
            load_dataset("folder", data_dir=folder, wanted=Wanted(test_share=0.5))
