"""Image classification sets by name, read and checked before anything else happens.

Sets of small images come as uint8 tensors, all others as lists of files. A new set is one decorated function, whose name
stands in `DATASET_NAMES`.
"""

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms import v2

from utils.errors import UserError
from utils.images.class_folders import SPLIT_SEED
from utils.images.dataset import Dataset, SmallImages, Wanted, in_memory, sized, why_size
from utils.images.image_folders import read_image_folders
from utils.images.preparation import SMALL_SIDE_PIXELS, is_small
from utils.images.settings import DATASET_NAMES

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS: dict[str, Callable[..., Dataset]] = {}


def dataset(name: str) -> Callable[[Callable[..., Dataset]], Callable[..., Dataset]]:
    """Registers `read(data_dir: Path, wanted: Wanted) -> Dataset` under `name`."""

    def register(read: Callable[..., Dataset]) -> Callable[..., Dataset]:
        if name not in DATASET_NAMES:
            raise ValueError(f"dataset {name!r} is not among the names that flags offer, DATASET_NAMES")
        DATASETS[name] = read
        return read

    return register


def load_dataset(name: str, *, data_dir: str | os.PathLike = "./data", wanted: Wanted | None = None) -> Dataset:
    """Reads the set `name` from `data_dir`, downloading it if it can be and `wanted` allows it.

    Raises UserError for an unknown name and for missing, empty, unreadable or mismatched folders and files.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: unknown, choose from {', '.join(DATASETS)}")
    wanted = wanted or Wanted()
    dataset = DATASETS[name](Path(data_dir), wanted)
    if not wanted.flip:
        dataset = replace(dataset, flip=False)
    return replace(dataset, mean=wanted.normalisation[0], std=wanted.normalisation[1]) if wanted.normalisation else dataset


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
    return _published("digits", tuple(map(str, digits.target_names)), train, test, wanted, flip=False)


@dataset("cifar10")
def _cifar10(data_dir: Path, wanted: Wanted) -> Dataset:
    return _cifar("cifar10", torchvision.datasets.CIFAR10, data_dir, wanted)


@dataset("cifar100")
def _cifar100(data_dir: Path, wanted: Wanted) -> Dataset:
    return _cifar("cifar100", torchvision.datasets.CIFAR100, data_dir, wanted)


def _cifar(name: str, reader: type[torchvision.datasets.CIFAR10], data_dir: Path, wanted: Wanted) -> Dataset:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            splits = [reader(str(data_dir), train=train, download=wanted.download) for train in (True, False)]
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
    return _published(name, tuple(splits[0].classes), train, test, wanted)


def _published(
    name: str, classes: tuple[str, ...], train: SmallImages, test: SmallImages, wanted: Wanted, *, flip: bool = True
) -> Dataset:
    """A set whose images are small and of one size, and have no folder; brought to the size that is wanted."""
    own = tuple(test.images.shape[2:])
    if wanted.test_share is not None:
        raise UserError(f"--test-share {wanted.test_share:g}: {name} has a split of its own")
    if wanted.asked_size is not None and not is_small(wanted.asked_size):
        raise UserError(
            f"--image-size {sized(wanted.asked_size)}: images of {name} have {sized(own)}, at most {SMALL_SIDE_PIXELS}"
        )
    size, reason = own, "that of all images"
    if wanted.size is not None and wanted.size != own and is_small(wanted.size):
        train, test = (
            SmallImages(v2.functional.resize(split.images, list(wanted.size)), split.labels) for split in (train, test)
        )
        size, reason = wanted.size, why_size(wanted)
    dataset = in_memory(name, classes, train, test, flip=flip, normalisation=wanted.normalisation)
    return replace(dataset, size=size, size_reason=reason)


@dataset("cinic10")
def _cinic10(data_dir: Path, wanted: Wanted) -> Dataset:
    """CINIC-10 (Darlow et al., 2018): image folders `train`, `valid`, `test`; `test` is scored if it is there."""
    return read_image_folders("cinic10", data_dir, wanted)


@dataset("imagenet")
def _imagenet(data_dir: Path, wanted: Wanted) -> Dataset:
    published = replace(wanted, normalisation=wanted.normalisation or (IMAGENET_MEAN, IMAGENET_STD))
    return read_image_folders("imagenet", data_dir, published, small=False)


@dataset("folder")
def _folder(data_dir: Path, wanted: Wanted) -> Dataset:
    return read_image_folders("folder", data_dir, wanted)
