"""Which images a run works on and how it is given them, without anything that has to be imported for it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from utils.errors import UserError, shown
from utils.images.spec import MAX_SIDE_PIXELS

DATASET_NAMES = ("digits", "cifar10", "cifar100", "cinic10", "imagenet", "folder")  # `utils.images.datasets` reads them


# Sets that are folders of images
FOLDER_DATASETS = frozenset(("cinic10", "imagenet", "folder"))
_SIZE = re.compile(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?")


def parsed_size(text: str) -> tuple[int, int]:
    """Height and width of `N` or `HxW`. Raises UserError for another text, or sides above MAX_SIDE_PIXELS."""
    found = _SIZE.fullmatch(text)
    sides = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= max(sides) <= MAX_SIDE_PIXELS:
        raise UserError(f"{shown(text, 60)} is not a size in pixels, N or HxW, each at most {MAX_SIDE_PIXELS}")
    return sides


@dataclass(frozen=True)
class DataSettings:
    """`batch_size` counts the images of all processes; `mean` and `std`, of three channels each, come together or not at all.

    `image_size` is that to which images are brought, as `parsed_size` reads it, `test_share` the part of a folder without a split
    that is for testing. `accept_data` lets a run go on with other images than it began with.
    """

    dataset: str = "digits"
    data_dir: str = "./data"
    batch_size: int = 128
    workers: int = 0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    limit_batches: int | None = None
    crop_padding: int | None = None
    image_size: str | None = None
    no_flip: bool = False
    test_share: float | None = None
    skip_broken: bool = False
    accept_data: bool = False
    may_download: bool = True

    @property
    def title(self) -> str:
        """What a person calls this set of images."""
        return self.data_dir if self.dataset == "folder" else self.dataset
