"""Which images a run works on and how it is given them, without anything that has to be imported for it."""

from collections.abc import Sequence
from dataclasses import dataclass

DATASET_NAMES = ("digits", "cifar10", "cifar100", "cinic10", "imagenet", "folder")  # `utils.images.datasets` reads them


@dataclass(frozen=True)
class DataSettings:
    """`batch_size` counts the images of all processes; `mean` and `std`, of three channels each, come together or not at all."""

    dataset: str = "digits"
    data_dir: str = "./data"
    batch_size: int = 128
    workers: int = 0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    limit_batches: int | None = None
    crop_padding: int | None = None
    may_download: bool = True

    @property
    def title(self) -> str:
        """What a person calls this set of images."""
        return self.data_dir if self.dataset == "folder" else self.dataset
