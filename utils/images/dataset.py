"""A set of images as a network is trained and tested on it, and how it is asked for.

Sets of small images lie in memory as uint8 tensors, all others are lists of files.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from utils.images.preparation import STREAMED_SIDE_PIXELS, is_small
from utils.images.spec import WIDEST_GREY_BITS, ImageSpec


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

    The training split is empty where only the test images were asked for. `size` is height and width of what a network is
    given, and `size_reason` why; None for that of images in memory. `remarks` are for the user to read before the images are
    made use of. `test_files` are those that were drawn for testing, and `broken` those that were left out, by their paths.
    `fingerprint`, a digest of the files' names and sizes, tells sets of files apart; empty for the published sets.
    """

    name: str
    classes: tuple[str, ...]
    train: SmallImages | ImageFiles
    test: SmallImages | ImageFiles
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    size: tuple[int, int] | None = None
    size_reason: str = ""
    grey_bits: int = WIDEST_GREY_BITS
    remarks: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    fingerprint: str = ""

    @property
    def streamed(self) -> bool:
        """Whether the images stay on disk and are decoded as they are needed."""
        return isinstance(self.test, ImageFiles)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what a network is given."""
        if not self.streamed:
            return tuple(self.test.images.shape[2:])
        return self.size or (STREAMED_SIDE_PIXELS,) * 2

    @property
    def images(self) -> ImageSpec:
        """What a network that is trained on this set has to be given later, and what its classes are called."""
        return ImageSpec(self.classes, self.image_size, self.mean, self.std, self.grey_bits)


Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Wanted:
    """How a set is to be read: for a network that has seen other images it must look as those did.

    `network` is what the network says of them, in the place of what the training images say; where it is only tested
    (`test_only`) the images are brought to its size, and the training images are not looked at unless for what it does not say.
    `normalisation` (mean and std) and `asked_size` (height and width) are what the user wants instead. Without `flip` no image
    is mirrored. `test_share` of a folder without a split are for testing. `skip_broken` leaves out what cannot be read.
    """

    download: bool = True
    network: ImageSpec | None = None
    normalisation: Normalisation | None = None
    asked_size: tuple[int, int] | None = None
    test_only: bool = False
    flip: bool = True
    test_share: float | None = None
    skip_broken: bool = False

    @property
    def size(self) -> tuple[int, int] | None:
        """The size that images are brought to, where it does not follow from them."""
        return self.asked_size or (self.network.image_size if self.network is not None and self.test_only else None)

    @property
    def streamed(self) -> bool:
        """Whether the network has seen crops of large images."""
        size = self.size or (self.network.image_size if self.network is not None else None)
        return size is not None and not is_small(size)


def in_memory(
    name: str,
    classes: tuple[str, ...],
    train: SmallImages,
    test: SmallImages,
    *,
    flip: bool = True,
    normalisation: Normalisation | None = None,
) -> Dataset:
    mean, std = normalisation or normalisation_of(train.images)
    return Dataset(name, classes, train, test, mean, std, flip)


def normalisation_of(images: Tensor) -> Normalisation:
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


def sized(size: tuple[int, int]) -> str:
    """Height and width as people write them, width first."""
    return f"{size[1]}x{size[0]}"


def why_size(wanted: Wanted) -> str:
    return "as --image-size says" if wanted.asked_size is not None else "what the network was trained on"
