"""Image classification sets by name, read and checked before anything else happens.

Sets of small images come as uint8 tensors, all others as lists of files. A new set is one decorated function.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError
from utils.seed import generator

SMALL_SIDE_PIXELS = 64
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
    """A training and a test split; `mean` and `std` are of the three channels of images scaled to [0, 1]."""

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
        return isinstance(self.train, ImageFiles)


DATASETS: dict[str, Callable[..., Dataset]] = {}


def dataset(name: str) -> Callable[[Callable[..., Dataset]], Callable[..., Dataset]]:
    """Registers `read(data_dir: Path, *, download: bool) -> Dataset` under `name`."""

    def register(read: Callable[..., Dataset]) -> Callable[..., Dataset]:
        DATASETS[name] = read
        return read

    return register


def load_dataset(name: str, *, data_dir: str | os.PathLike = "./data", download: bool = True) -> Dataset:
    """Reads the set `name` from `data_dir`, downloading it if it can be and `download` allows it.

    Raises UserError for an unknown name and for missing, empty, unreadable or mismatched folders and files.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: unknown, choose from {', '.join(DATASETS)}")
    return DATASETS[name](Path(data_dir), download=download)


@dataset("digits")
def _digits(data_dir: Path, *, download: bool) -> Dataset:
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
def _cifar10(data_dir: Path, *, download: bool) -> Dataset:
    return _cifar("cifar10", torchvision.datasets.CIFAR10, data_dir, download)


@dataset("cifar100")
def _cifar100(data_dir: Path, *, download: bool) -> Dataset:
    return _cifar("cifar100", torchvision.datasets.CIFAR100, data_dir, download)


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
def _cinic10(data_dir: Path, *, download: bool) -> Dataset:
    """CINIC-10 (Darlow et al., 2018): image folders `train`, `valid`, `test`; `test` is scored if it is there."""
    return _image_folders("cinic10", data_dir)


@dataset("imagenet")
def _imagenet(data_dir: Path, *, download: bool) -> Dataset:
    return _image_folders("imagenet", data_dir, normalisation=(IMAGENET_MEAN, IMAGENET_STD), small=False)


@dataset("folder")
def _folder(data_dir: Path, *, download: bool) -> Dataset:
    return _image_folders("folder", data_dir)


Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


def _image_folders(name: str, data_dir: Path, *, normalisation: Normalisation | None = None, small: bool = True) -> Dataset:
    if not data_dir.is_dir():
        raise UserError(
            f"--data-dir {data_dir}: no such folder; --dataset {name} reads train/<class>/* and test|val|valid/<class>/*"
        )
    train_dir = data_dir / "train"
    test_dir = next((data_dir / split for split in ("test", "val", "valid") if (data_dir / split).is_dir()), None)
    if not train_dir.is_dir() or test_dir is None:
        raise UserError(f"--data-dir {data_dir}: needs the folders train and test (or val, or valid) with one folder a class")
    classes, train = _list_images(train_dir)
    test_classes, test = _list_images(test_dir)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise UserError(f"--data-dir {data_dir}: train and {test_dir.name} have different class folders, such as {odd[0]!r}")
    if small and (decoded := _decode_if_small(train, test)):
        return _in_memory(name, classes, *decoded)
    _check_images((*train.paths, *test.paths))
    mean, std = normalisation or _sampled_normalisation(train)
    return Dataset(name, classes, train, test, mean, std)


def _list_images(folder: Path) -> tuple[tuple[str, ...], ImageFiles]:
    """Class names in sorted order and every image below them."""
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not classes:
        raise UserError(f"--data-dir: {folder} has no class folders")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(str(path) for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise UserError(f"--data-dir: the class folder {folder / name} holds no image ({', '.join(IMG_EXTENSIONS)})")
        paths += found
        labels += [label] * len(found)
    return classes, ImageFiles(tuple(paths), torch.tensor(labels))


_IMAGE_ERRORS = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(path: str) -> Image.Image:
    """The image at `path` in RGB. Raises UserError, naming the file, if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except _IMAGE_ERRORS as error:
        raise UserError(f"--data-dir: the image {path} cannot be read ({error})") from error


def _check_images(paths: Sequence[str]) -> None:
    """Opens the files and decodes some of them; of a large set a fixed sample, for it would take minutes at every start.

    Raises UserError for the first that cannot be read.
    """
    order = torch.randperm(len(paths), generator=generator(SPLIT_SEED, "check")).tolist()
    opened = sorted(paths[row] for row in order[:OPENED_FILES])
    decoded = sorted(paths[row] for row in order[:SAMPLED_FILES])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(_open_image, opened):
            pass
        for _ in pool.map(read_image, decoded):
            pass


def _open_image(path: str) -> None:
    try:
        with Image.open(path):
            pass
    except _IMAGE_ERRORS as error:
        raise UserError(f"--data-dir: the image {path} cannot be read ({error})") from error


def _decode_if_small(train: ImageFiles, test: ImageFiles) -> tuple[SmallImages, SmallImages] | None:
    """Both splits in memory if every image has one and the same small size."""
    first_of_class = {int(label): path for path, label in zip(reversed(train.paths), train.labels.flip(0), strict=True)}
    sizes = {read_image(path).size for path in first_of_class.values()}
    if len(sizes) > 1 or max(max(size) for size in sizes) > SMALL_SIDE_PIXELS:
        return None
    size = sizes.pop()
    decoded = [_decode(split.paths, size) for split in (train, test)]
    if decoded[0] is None or decoded[1] is None:
        return None
    return SmallImages(decoded[0], train.labels), SmallImages(decoded[1], test.labels)


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

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fits = all(pool.map(decode, _chunks(len(paths))))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() if fits else None


def _chunks(length: int, size: int = 1024) -> Iterator[range]:
    return (range(start, min(start + size, length)) for start in range(0, length, size))


def _in_memory(name: str, classes: tuple[str, ...], train: SmallImages, test: SmallImages, *, flip: bool = True) -> Dataset:
    mean, std = _normalisation(train.images)
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
