"""What the data pipeline costs: batches of small images held in memory, beside a ResNet-20 step, and decoded JPEG files.

    python -m benchmarks.data_pipeline

The small set is noise in CIFAR-10's size, 50,000 images of 32x32; the files are JPEGs of ImageNet's usual size, 500x375.
"""

import argparse
import statistics
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import add_common_flags, machine, report, synthetic_batch
from benchmarks.step_cost import plain_step
from models import build_model
from utils import cli
from utils.device import choose_device, to_device
from utils.images.batches import ImageData
from utils.images.dataset import Dataset, ImageFiles, SmallImages
from utils.images.datasets import IMAGENET_MEAN, IMAGENET_STD
from utils.timing import interleaved_seconds, median_ratio
from utils.world import World

SMALL_SET_IMAGES = 50_000
FILE_SIZE_PIXELS = (500, 375)


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="data_pipeline.py", description="Cost of the data pipeline.")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="images a batch")
    parser.add_argument("--files", type=cli.positive_int, default=512, help="JPEG files of the streamed set")
    parser.add_argument("--workers", type=cli.non_negative_int, nargs="+", default=[0, 2], help="processes that decode files")
    add_common_flags(parser, name="data_pipeline", rounds=5)
    return parser


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device, None, World())
    rows = [measure_small_images(args, device)]
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), args.files)
        rows += [measure_files(files, args, workers, device) for workers in args.workers]
    report("data_pipeline", rows, output=args.output, machine=machine(device), batch_size=args.batch_size, rounds=args.rounds)


def measure_small_images(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """An epoch of augmented batches, what it draws at its beginning included, in units of as many ResNet-20 steps."""
    data = ImageData(small_set(), batch_size=args.batch_size, seed=0, device=device)
    network = to_device(build_model("resnet20", num_classes=10), device)
    step = plain_step(network, synthetic_batch(args.batch_size, device=device), mode="float32")
    work = {"epoch": lambda: exhaust(data.train_batches(0)), "step": step}
    seconds = interleaved_seconds(work, device=device, rounds=args.rounds)
    batches = [value / data.train_steps for value in seconds["epoch"]]
    share = 100 * median_ratio(batches, seconds["step"])
    return _row("small images in memory", args.batch_size, statistics.median(batches), share)


def measure_files(dataset: Dataset, args: argparse.Namespace, workers: int, device: torch.device) -> dict[str, Any]:
    data = ImageData(dataset, batch_size=args.batch_size, seed=0, device=device, workers=workers)
    work = {"epoch": lambda: exhaust(data.train_batches(0))}
    seconds = interleaved_seconds(work, device=device, rounds=args.rounds, warmups=1)["epoch"]
    return _row(f"JPEG files, {workers} workers", args.batch_size, statistics.median(seconds) / data.train_steps, None)


def _row(pipeline: str, batch_size: int, seconds: float, share: float | None) -> dict[str, Any]:
    rates = {"ms a batch": 1000 * seconds, "images/s": batch_size / seconds}
    return {"pipeline": pipeline, **rates, "% of a ResNet-20 step": share}


def exhaust(batches: Iterator[Any]) -> None:
    deque(batches, maxlen=0)


def small_set() -> Dataset:
    images = torch.randint(256, (SMALL_SET_IMAGES, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = SmallImages(images, torch.arange(SMALL_SET_IMAGES) % 10)
    return Dataset("noise", tuple(map(str, range(10))), split, split, (0.5,) * 3, (0.25,) * 3)


def write_files(folder: Path, count: int) -> Dataset:
    """`count` smooth images, for noise takes longer to decode than a photograph; they come to about 100 kB each."""
    stream = np.random.default_rng(0)
    paths = []
    for index in range(count):
        path = folder / f"{index}.jpg"
        coarse = Image.fromarray(stream.integers(256, size=(94, 125, 3), dtype=np.uint8))
        coarse.resize(FILE_SIZE_PIXELS, Image.Resampling.BICUBIC).save(path, quality=92)
        paths.append(str(path))
    split = ImageFiles(tuple(paths), torch.arange(count) % 10)
    return Dataset("files", tuple(map(str, range(10))), split, split, IMAGENET_MEAN, IMAGENET_STD)


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
