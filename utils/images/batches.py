"""Batches on the run's device: small sets live there and are augmented a whole batch at a time, large ones stream.

The order of the images and every crop and flip are functions of the seed, the epoch and the position in it, so an epoch
can be entered at any batch, and neither the device nor the number of workers or processes changes what a batch holds.
"""

import signal
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from utils.errors import UserError
from utils.images.class_folders import SPLIT_SEED
from utils.images.dataset import Dataset, ImageFiles, SmallImages
from utils.images.decoding import read_image
from utils.images.preparation import test_transform
from utils.images.spec import ImageSpec
from utils.seed import derived_seed, generator
from utils.world import World

CROP_PADDING_PIXELS = 4  # He et al., CVPR 2016, section 4.2
GRACE_SECONDS = 10
EXAMPLES = 8


class Batch(NamedTuple):
    """This process's part of a batch: `images` (b, 3, H, W) normalised float32, `labels` (b,) int64, both on the device.

    `weight` makes a mean over processes the mean over the whole batch: b * processes / B, 1 in a single process. `indices`
    (b,) int64, on the device, are the rows of the images in their split; None where they are of no set.
    """

    images: Tensor
    labels: Tensor
    weight: float
    indices: Tensor | None = None


class ImageData:
    """Training and test batches of one dataset for one process of `world`.

    `batch_size` counts the images of all processes together; at most `limit_batches` batches are given an epoch, in
    training and in testing, where they are a fixed draw from all classes. A last training batch too small to give every
    process two images (batch normalisation needs two) is left out; without a limit every test image is given exactly once.
    Small training images are cropped at random out of a frame of `crop_padding` zeros on every side. `remarks` are for the user
    to read before the images are made use of. Raises UserError for a `crop_padding` of large images, which have no frame.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        world: World | None = None,
        workers: int = 0,
        limit_batches: int | None = None,
        crop_padding: int | None = None,
        remarks: Sequence[str] = (),
    ):
        if crop_padding is not None and dataset.streamed:
            raise UserError(f"--crop-padding {crop_padding}: is for small images; those of {dataset.name} are resized")
        self.dataset, self.device, self.world, self.remarks = dataset, device, world or World(), (*remarks, *dataset.remarks)
        self.batch_size, self.seed, self.workers, self.limit_batches = batch_size, seed, workers, limit_batches
        self.crop_padding = crop_padding
        train_length, test_length = len(dataset.train.labels), len(dataset.test.labels)
        last_is_usable = train_length % batch_size >= 2 * self.world.size
        self.train_steps = train_length // batch_size + last_is_usable
        self.test_steps = -(-test_length // batch_size)
        if limit_batches is not None:
            self.train_steps, self.test_steps = min(self.train_steps, limit_batches), min(self.test_steps, limit_batches)
        shown = min(test_length, self.test_steps * batch_size)
        if shown < test_length:
            self.remarks += (f"top1 of {shown} of {test_length} test images, as --limit-batches {limit_batches} says",)
        self.shown_test_images = shown
        self._test_order = _fixed_order(dataset.test.labels, shown)
        if dataset.streamed:
            self._train = _StreamedSplit(dataset.train, dataset, device=device, augment=True, workers=workers)
            self._test = _StreamedSplit(dataset.test, dataset, device=device, augment=False, workers=workers)
        else:
            padding = CROP_PADDING_PIXELS if crop_padding is None else crop_padding
            self._train = _DeviceSplit(dataset.train, dataset, device=device, crop_padding=padding)
            self._test = _DeviceSplit(dataset.test, dataset, device=device)

    def alone(self) -> "ImageData":
        """The same data for a process that works without the others."""
        if self.world.size == 1:
            return self
        return ImageData(
            self.dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
            workers=self.workers,
            limit_batches=self.limit_batches,
            crop_padding=self.crop_padding,
        )

    @cached_property
    def example(self) -> Tensor:
        """Test images of several classes, at most 8 of them, on the device; the same ones in every process."""
        rows = _fixed_draw(self.dataset.test.labels, min(EXAMPLES, len(self.dataset.test.labels)))
        return next(self._test.batches([rows], [0], seed=0))[0]

    @property
    def train_images(self) -> int:
        """How many images one epoch of training shows, over all processes."""
        return min(self.train_steps * self.batch_size, len(self.dataset.train.labels))

    def train_batches(self, epoch: int | str, *, start: int = 0) -> Iterator[Batch]:
        """The augmented batches of an epoch from number `start` on; a word as `epoch` names a pass outside the training."""
        order = torch.randperm(len(self.dataset.train.labels), generator=generator(self.seed, "order", epoch))
        rows = [order[step * self.batch_size : (step + 1) * self.batch_size] for step in range(start, self.train_steps)]
        first_image = start * self.batch_size
        yield from self._batches(self._train, rows, seed=derived_seed(self.seed, "augmentation", epoch), first_image=first_image)

    def plain_batches(self, count: int) -> list[Tensor]:
        """`count` training images, drawn by the seed, as they are tested: not augmented; in batches on the device.

        The same ones in every process, all of them.
        """
        drawn = torch.randperm(len(self.dataset.train.labels), generator=generator(self.seed, "plain"))[:count]
        return [images for images, _ in self._plain(drawn)]

    def held_out_batches(self, count: int, *, seen: Tensor) -> list[tuple[Tensor, Tensor]]:
        """At most `count` training images with their labels, drawn by the seed from all but the rows `seen` (N,).

        As they are tested, not augmented; in batches on the device. The same ones in every process, all of them.
        """
        others = torch.ones(len(self.dataset.train.labels), dtype=torch.bool)
        others[seen.cpu()] = False
        rows = others.nonzero().flatten()
        return self._plain(rows[torch.randperm(len(rows), generator=generator(self.seed, "held out"))[:count]])

    def _plain(self, drawn: Tensor) -> list[tuple[Tensor, Tensor]]:
        split = self._plain_split(drawn.sort().values)
        rows = list(torch.arange(len(drawn)).split(self.batch_size)) if len(drawn) else []
        return [(images, labels) for images, labels, _ in split.batches(rows, [0] * len(rows), seed=0)]

    def _plain_split(self, rows: Tensor) -> "_DeviceSplit | _StreamedSplit":
        train = self.dataset.train
        if isinstance(train, SmallImages):
            return _DeviceSplit(SmallImages(train.images[rows], train.labels[rows]), self.dataset, device=self.device)
        files = ImageFiles(tuple(train.paths[row] for row in rows.tolist()), train.labels[rows])
        return _StreamedSplit(files, self.dataset, device=self.device, augment=False, workers=self.workers)

    def test_batches(self) -> Iterator[Batch]:
        """The test images in their own order, or with `limit_batches` so many that were drawn, without augmentation."""
        yield from self._batches(self._test, self._test_order.split(self.batch_size), seed=0, first_image=0)

    def _batches(
        self, split: "_DeviceSplit | _StreamedSplit", rows: Sequence[Tensor], *, seed: int, first_image: int
    ) -> Iterator[Batch]:
        parts, positions, weights = [], [], []
        for index, batch in enumerate(rows):
            share = self.world.share(len(batch))
            part = batch[share]
            if len(part):  # a last test batch may be smaller than the number of processes
                parts.append(part)
                # the position of an image in the epoch says which random numbers are its own
                positions.append(first_image + index * self.batch_size + share.start)
                weights.append(len(part) * self.world.size / len(batch))
        for (images, labels, indices), weight in zip(split.batches(parts, positions, seed), weights, strict=True):
            yield Batch(images, labels, weight, indices)


def _fixed_order(labels: Tensor, count: int) -> Tensor:
    """All rows in order, or where there are more than `count` of them a draw."""
    return torch.arange(count) if count == len(labels) else _fixed_draw(labels, count)


def _fixed_draw(labels: Tensor, count: int) -> Tensor:
    """`count` rows that every run draws alike, in random order: of each class its share, as nearly as that can be."""
    stream = generator(SPLIT_SEED, "limited test")
    shuffled = torch.randperm(len(labels), generator=stream)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    evenly = by_class[(2 * torch.arange(count) + 1) * len(labels) // (2 * count)]
    return evenly[torch.randperm(count, generator=stream)]


class Normaliser:
    """uint8 images to float32 with mean 0 and deviation 1 a channel, on the device."""

    def __init__(self, spec: Dataset | ImageSpec, device: torch.device):
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)


class _DeviceSplit:
    """A set of small images, wholly on the device as (N, H, W, 3) uint8, so that a crop is a copy of contiguous rows.

    They are augmented where `crop_padding` is given.
    """

    def __init__(self, split: SmallImages, dataset: Dataset, *, device: torch.device, crop_padding: int | None = None):
        self.crop_padding, self.flip, self.device = crop_padding, dataset.flip, device
        self.normalise = Normaliser(dataset, device)
        pixels = split.images.to(device)
        self.height, self.width = pixels.shape[2:]
        if crop_padding is not None:
            pixels = F.pad(pixels, (crop_padding,) * 4)
        self.pixels = pixels.permute(0, 2, 3, 1).contiguous()
        self.labels = split.labels.to(device)

    def batches(self, parts: list[Tensor], positions: list[int], seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every random number of the epoch is drawn and sent to the device at once: no transfer within a step."""
        draws = self._draw(len(self.labels), seed) if self.crop_padding is not None else None
        rows_on_device = torch.cat(parts).to(self.device) if parts else torch.empty(0)
        begin = 0
        for part, position in zip(parts, positions, strict=True):
            rows = rows_on_device[begin : begin + len(part)]
            begin += len(part)
            images = self.pixels[rows] if draws is None else self._augmented(rows, draws[:, position : position + len(part)])
            yield self.normalise(images.permute(0, 3, 1, 2)), self.labels[rows], rows

    def _draw(self, length: int, seed: int) -> Tensor:
        """(3, N): vertical and horizontal offset of the crop, and whether to flip, for each position of the epoch."""
        stream = torch.Generator().manual_seed(seed)
        offsets = torch.randint(2 * self.crop_padding + 1, (2, length), generator=stream)
        flips = torch.randint(2, (1, length), generator=stream)
        return torch.cat([offsets, flips]).to(self.device)

    def _augmented(self, rows: Tensor, draws: Tensor) -> Tensor:
        """(b, H, W, 3): random crops of the padded images, half of them mirrored where the set allows it."""
        offset_y, offset_x, flip = draws
        images = self._windows()[rows, offset_y, offset_x].view(-1, self.height, self.width, 3)
        if not self.flip:
            return images
        return torch.where(flip.bool().view(-1, 1, 1, 1), images.flip(2), images)

    def _windows(self) -> Tensor:
        """A view (N, 2P + 1, 2P + 1, H, W * 3) over every crop of every image padded by P; nothing is copied."""
        count, side = len(self.pixels), 2 * self.crop_padding + 1
        image, row, column, _ = self.pixels.stride()
        return self.pixels.as_strided((count, side, side, self.height, self.width * 3), (image, row, column, row, 1))


class _StreamedSplit:
    """Files that workers decode and augment with torchvision; normalised on the device."""

    def __init__(self, split: ImageFiles, dataset: Dataset, *, device: torch.device, augment: bool, workers: int):
        self.device, self.normalise = device, Normaliser(dataset, device)
        self.plan = _StepSampler()
        self.loader = DataLoader(
            _Files(split, _transform(dataset, augment=augment), dataset.grey_bits),
            batch_sampler=self.plan,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_outlive_stop_signals,
            generator=torch.Generator(),  # its own: a pass over the data must not move the stream that dropout draws from
        )

    def batches(self, parts: list[Tensor], positions: list[int], seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        self.plan.steps = [
            [(row, derived_seed(seed, position + index)) for index, row in enumerate(part.tolist())]
            for part, position in zip(parts, positions, strict=True)
        ]
        for (images, labels), part in zip(self._loaded(), parts, strict=True):
            images = self.normalise(images.to(self.device, non_blocking=True))
            yield images, labels.to(self.device, non_blocking=True), part.to(self.device, non_blocking=True)

    def _loaded(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from self.loader
        except UserError as error:  # from a worker it comes with that worker's traceback as its message
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None


class _StepSampler:
    """A batch sampler that gives the steps it was told: lists of (row, seed of its augmentation)."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


class _Files(torch.utils.data.Dataset):
    """Decoded and transformed images, each from a random stream of its own."""

    def __init__(self, split: ImageFiles, transform: v2.Transform, grey_bits: int):
        self.split, self.transform, self.grey_bits = split, transform, grey_bits

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        row, seed = item
        try:
            image = read_image(self.split.paths[row], grey_bits=self.grey_bits)
        except UserError as error:
            raise UserError(f"--data-dir: {error}") from error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), self.split.labels[row]


def _outlive_stop_signals(worker: int) -> None:
    """A signal to all processes, as Ctrl-C or a preemption is, leaves the end to the main one, which finishes its step first.

    SIGTERM still ends a worker, but later: with it multiprocessing ends those that are left when the program exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))


def _transform(dataset: Dataset, *, augment: bool) -> v2.Transform:
    if not augment:
        return test_transform(dataset.image_size)
    flip = [v2.RandomHorizontalFlip()] if dataset.flip else []
    return v2.Compose([v2.RandomResizedCrop(dataset.image_size), *flip, v2.PILToTensor()])
