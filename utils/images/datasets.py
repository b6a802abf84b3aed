"""Image classification sets by name, read and checked before anything else happens.

Sets of small images come as uint8 tensors, all others as lists of files. A new set is one decorated function, whose name
stands in `DATASET_NAMES`.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from utils.errors import UserError
from utils.images.settings import DATASET_NAMES, IMAGE_SUFFIXES
from utils.images.spec import ImageSpec
from utils.seed import generator
from utils.world import world_from_environment

SMALL_SIDE_PIXELS = 64
STREAMED_SIDE_PIXELS = 224
SPLIT_SEED = 0
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLED_FILES = 512
OPENED_FILES = 50_000


class SmallImages(NamedTuple):
    """A split in memory: `images` (N, 3, H, W) uint8, `labels` (N,) int64."""

    images: Tensor
    labels: Tensor


class ImageFiles(NamedTuple):
    """A split on disk: one path and one class index an image."""

    paths: tuple[str, ...]
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """A training and a test split; `mean` and `std` are of the three channels of images scaled to [0, 1].

    The training split is empty where only the test images were asked for.
    """

    name: str
    classes: tuple[str, ...]
    train: SmallImages | ImageFiles
    test: SmallImages | ImageFiles
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True

    @property
    def streamed(self) -> bool:
        """Whether the images stay on disk and are decoded as they are needed."""
        return isinstance(self.test, ImageFiles)

    @property
    def images(self) -> ImageSpec:
        """What a network that is trained on this set has to be given later, and what its classes are called."""
        size = (STREAMED_SIDE_PIXELS,) * 2 if self.streamed else tuple(self.test.images.shape[2:])
        return ImageSpec(self.classes, size, self.mean, self.std)


Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Wanted:
    """How a set is to be read: for a network that has seen other images it must look as those did.

    `normalisation` (mean and std) and `image_size` (height and width) are those of the network, if it is known, in the
    place of what the training images say. With `test_only` the training images are not looked at unless for that.
    """

    download: bool = True
    normalisation: Normalisation | None = None
    image_size: tuple[int, int] | None = None
    test_only: bool = False

    @property
    def streamed(self) -> bool:
        """Whether the network has seen crops of large images."""
        return self.image_size is not None and max(self.image_size) > SMALL_SIDE_PIXELS


DATASETS: dict[str, Callable[..., Dataset]] = {}


def dataset(name: str) -> Callable[[Callable[..., Dataset]], Callable[..., Dataset]]:
    """Registers `read(data_dir: Path, wanted: Wanted) -> Dataset` under `name`."""

    def register(read: Callable[..., Dataset]) -> Callable[..., Dataset]:
        if name not in DATASET_NAMES:
            raise ValueError(f"dataset {name!r} is not among the names that flags offer, DATASET_NAMES")
        DATASETS[name] = read
        return read

    return register


def load_dataset(
    name: str,
    *,
    data_dir: str | os.PathLike = "./data",
    download: bool = True,
    normalisation: Normalisation | None = None,
    image_size: tuple[int, int] | None = None,
    test_only: bool = False,
) -> Dataset:
    """Reads the set `name` from `data_dir`, downloading it if it can be and `download` allows it.

    The other options are those of `Wanted`. Raises UserError for an unknown name and for missing, empty, unreadable or
    mismatched folders and files.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: unknown, choose from {', '.join(DATASETS)}")
    wanted = Wanted(download, normalisation, image_size, test_only)
    dataset = DATASETS[name](Path(data_dir), wanted)
    return replace(dataset, mean=normalisation[0], std=normalisation[1]) if normalisation is not None else dataset


@dataset("digits")
def _digits(data_dir: Path, wanted: Wanted) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8, 16 grey levels), enlarged to 3x32x32; a fifth of each class for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # (N, 1, 8, 8)
    images = F.interpolate(grey, size=32, mode="bilinear", align_corners=False).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=SPLIT_SEED, stratify=digits.target)
    train, test = (SmallImages(images[part].contiguous(), labels[part]) for part in map(torch.from_numpy, rows))
    return _in_memory("digits", tuple(map(str, digits.target_names)), train, test, flip=False)


@dataset("cifar10")
def _cifar10(data_dir: Path, wanted: Wanted) -> Dataset:
    return _cifar("cifar10", torchvision.datasets.CIFAR10, data_dir, wanted.download)


@dataset("cifar100")
def _cifar100(data_dir: Path, wanted: Wanted) -> Dataset:
    return _cifar("cifar100", torchvision.datasets.CIFAR100, data_dir, wanted.download)


def _cifar(name: str, reader: type[torchvision.datasets.CIFAR10], data_dir: Path, download: bool) -> Dataset:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            splits = [reader(str(data_dir), train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        archive, folder = data_dir / reader.filename, data_dir / reader.base_folder
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--dataset {name}: neither the folder {folder} nor the file {archive} is complete, and it could not be "
            f"downloaded ({reason}); put {reader.filename} there or choose another --data-dir"
        ) from error
    train, test = (
        SmallImages(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))
        for split in splits
    )
    return _in_memory(name, tuple(splits[0].classes), train, test)


@dataset("cinic10")
def _cinic10(data_dir: Path, wanted: Wanted) -> Dataset:
    """CINIC-10 (Darlow et al., 2018): image folders `train`, `valid`, `test`; `test` is scored if it is there."""
    return _image_folders("cinic10", data_dir, wanted)


@dataset("imagenet")
def _imagenet(data_dir: Path, wanted: Wanted) -> Dataset:
    published = replace(wanted, normalisation=wanted.normalisation or (IMAGENET_MEAN, IMAGENET_STD))
    return _image_folders("imagenet", data_dir, published, small=False)


@dataset("folder")
def _folder(data_dir: Path, wanted: Wanted) -> Dataset:
    return _image_folders("folder", data_dir, wanted)


def _image_folders(name: str, data_dir: Path, wanted: Wanted, *, small: bool = True) -> Dataset:
    if not data_dir.is_dir():
        raise UserError(
            f"--data-dir {data_dir}: no such folder; --dataset {name} reads train/<class>/* and test|val|valid/<class>/*"
        )
    classes, train, test = _list_splits(data_dir, wanted)
    if small and not wanted.streamed and (decoded := _decode_if_small(train, test)):
        return _in_memory(name, classes, *decoded, normalisation=wanted.normalisation)
    _check_images((*train.paths, *test.paths))
    mean, std = wanted.normalisation or _sampled_normalisation(train)
    return Dataset(name, classes, train, test, mean, std)


def _list_splits(data_dir: Path, wanted: Wanted) -> tuple[tuple[str, ...], ImageFiles, ImageFiles]:
    """Class names, training images, none where they are not asked for, and test images."""
    train_dir = data_dir / "train"
    test_dir = next((data_dir / split for split in ("test", "val", "valid") if (data_dir / split).is_dir()), None)
    if test_dir is None:
        raise UserError(f"--data-dir {data_dir}: needs the folders train and test (or val, or valid) with one folder a class")
    test_classes, test = _list_images(test_dir)
    if wanted.test_only and wanted.normalisation is not None:
        return test_classes, ImageFiles((), torch.tensor([], dtype=torch.int64)), test
    if not train_dir.is_dir():
        need = "give --mean and --std, for the network does not bring them" if wanted.test_only else "training needs it"
        raise UserError(f"--data-dir {data_dir}: has no folder train beside {test_dir.name}: {need}")
    classes, train = _list_images(train_dir)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise UserError(f"--data-dir {data_dir}: train and {test_dir.name} have different class folders, such as {odd[0]!r}")
    return classes, train, test


def _list_images(folder: Path) -> tuple[tuple[str, ...], ImageFiles]:
    """Class names in sorted order and every image below them."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise UserError(f"--data-dir: {folder} has no class folders")
    paths, labels = [], []
    for label, name in enumerate(names):
        found = sorted(str(path) for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"--data-dir: the class folder {folder / name} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        paths += found
        labels += [label] * len(found)
    classes = tuple(os.fsencode(name).decode(errors="backslashreplace") for name in names)  # text that any file can hold
    return classes, ImageFiles(tuple(paths), torch.tensor(labels))


_IMAGE_ERRORS = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(path: str) -> Image.Image:
    """The image at `path` in RGB, 8 bits a channel. Raises UserError, naming the file, if it cannot be read.

    Grey images of 16 bits and of floating-point numbers from 0 to 1 are scaled to 0 to 255. Transparency is left out and
    the colour below it is shown, as torchvision's ImageFolder does it.
    """
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except _IMAGE_ERRORS as error:
        raise UserError(f"--data-dir: the image {path} cannot be read ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(np.asarray(image)))
    elif isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours as from the palette at once, of which Pillow warns
    return image.convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits as uint8, rounded; converting them otherwise would cut them off at 255."""
    white = 1 if np.issubdtype(values.dtype, np.floating) else 65535
    lowest, highest = values.min(), values.max()
    if not 0 <= lowest <= highest <= white:  # NaN is neither
        raise ValueError(f"its grey values go from {lowest} to {highest}, expected 0 to {white}")
    return np.rint(values * (255 / white)).astype(np.uint8)


def _check_images(paths: Sequence[str]) -> None:
    """Opens the files and decodes some of them; of a large set a fixed sample, for it would take minutes at every start.

    Raises UserError for the first that cannot be read.
    """
    order = torch.randperm(len(paths), generator=generator(SPLIT_SEED, "check")).tolist()
    opened = sorted(paths[row] for row in order[:OPENED_FILES])
    decoded = sorted(paths[row] for row in order[:SAMPLED_FILES])
    with _bar("checking images", len(opened) + len(decoded)) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in chain(pool.map(_open_image, opened), pool.map(read_image, decoded)):
            bar.update()


def _bar(description: str, total: int) -> tqdm:
    """Shown on a terminal once it takes more than a second, by one process."""
    disable = None if world_from_environment().is_main else True
    return tqdm(total=total, desc=description, unit="image", disable=disable, delay=1, leave=False)


def _open_image(path: str) -> None:
    try:
        with Image.open(path):
            pass
    except _IMAGE_ERRORS as error:
        raise UserError(f"--data-dir: the image {path} cannot be read ({error})") from error


def _decode_if_small(train: ImageFiles, test: ImageFiles) -> tuple[SmallImages, SmallImages] | None:
    """Both splits in memory if every image has one and the same small size."""
    firsts = [path for split in (train, test) for path in _first_of_each_class(split)]
    sizes = {read_image(path).size for path in firsts}
    if len(sizes) > 1 or max(max(size) for size in sizes) > SMALL_SIDE_PIXELS:
        return None
    size = sizes.pop()
    decoded = [_decode(split.paths, size) for split in (train, test)]
    if decoded[0] is None or decoded[1] is None:
        return None
    return SmallImages(decoded[0], train.labels), SmallImages(decoded[1], test.labels)


def _first_of_each_class(split: ImageFiles) -> list[str]:
    return list({int(label): path for path, label in zip(reversed(split.paths), split.labels.flip(0), strict=True)}.values())


def _decode(paths: Sequence[str], size: tuple[int, int]) -> Tensor | None:
    """(N, 3, H, W) uint8, or None if some image has another size."""
    width, height = size
    images = np.empty((len(paths), height, width, 3), np.uint8)

    def decode(rows: range) -> bool:
        for row in rows:
            image = read_image(paths[row])
            if image.size != size:
                return False
            images[row] = np.asarray(image)
        return True

    with _bar("reading images", len(paths)) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks, fits = list(_chunks(len(paths))), True
        for rows, fits in zip(chunks, pool.map(decode, chunks), strict=True):
            if not fits:
                break
            bar.update(len(rows))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() if fits else None


def _chunks(length: int, size: int = 1024) -> Iterator[range]:
    return (range(start, min(start + size, length)) for start in range(0, length, size))


def _in_memory(
    name: str,
    classes: tuple[str, ...],
    train: SmallImages,
    test: SmallImages,
    *,
    flip: bool = True,
    normalisation: Normalisation | None = None,
) -> Dataset:
    mean, std = normalisation or _normalisation(train.images)
    return Dataset(name, classes, train, test, mean, std, flip)


def _normalisation(images: Tensor) -> Normalisation:
    """Exact mean and standard deviation of each channel, from its histogram."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        histogram = sum(torch.bincount(part.reshape(-1).int(), minlength=256) for part in images[:, channel].split(4096))
        weights = histogram.double() / histogram.sum()
        mean = float(weights @ levels)
        means.append(mean)
        deviations.append(max(float(weights @ (levels - mean).square()) ** 0.5, 1e-3))
    return tuple(means), tuple(deviations)


def _sampled_normalisation(files: ImageFiles) -> Normalisation:
    """Mean and standard deviation over a fixed sample of the training images, each brought to 64x64."""
    rows = torch.randperm(len(files.paths), generator=generator(SPLIT_SEED, "normalisation"))[:SAMPLED_FILES]
    sample = [np.asarray(read_image(files.paths[row]).resize((SMALL_SIDE_PIXELS,) * 2)) for row in rows.tolist()]
    return _normalisation(torch.from_numpy(np.stack(sample)).permute(0, 3, 1, 2))
