"""What a training prints and records: how it begins, the bar, line and numbers of each epoch, how it ended."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from utils.errors import printable
from utils.images.batches import ImageData
from utils.images.dataset import sized
from utils.runs.run import Run, interpreter

FEWEST_CLASSES_OF_TOP5 = 6  # of five classes every one is among the first five
MOST_CLASSES_SHOWN = 10
LINE_CHARACTERS = 80
WIDTHS = {"epoch": 7, "lr": 8, "left": 7}  # of columns, in characters; 6 of all others
NOT_SHIPPED = {"average_top1": "EMA top1", "trained_top1": "no EMA top1"}  # what the other network beside an average is called


class EpochReport:
    """Says how a training of `n_epochs` goes on, on the screen and in the files of `run`."""

    def __init__(self, run: Run, data: ImageData, *, n_epochs: int):
        self.run, self.data, self.n_epochs = run, data, n_epochs
        self._has_heading = False

    def progress_bar(self, epoch: int, *, done: int) -> tqdm:
        """The bar of an epoch of which `done` steps are behind; none but the main process has one, and only at a terminal."""
        description = f"epoch {epoch + 1}/{self.n_epochs}"
        disable = None if self.run.world.is_main else True  # None: quiet where stderr is no terminal
        return tqdm(total=self.data.train_steps, initial=done, desc=description, disable=disable, leave=False, unit="step")

    def epoch(
        self,
        epoch: int,
        scores: Mapping[str, Mapping[str, float]],
        *,
        lr: float,
        seconds: Mapping[str, float],
        skipped_steps: int,
        best: Mapping[str, float],
    ) -> None:
        """Records and logs an epoch that has ended: `scores` of `train` and `test`, and the `seconds` that each took.

        `skipped_steps` are those of its training that an earlier process did, which are not in `seconds`.
        """
        done = 1 - skipped_steps / self.data.train_steps
        for split, images in (("train", scores["train"]["images"] * done), ("test", scores["test"]["images"])):
            self._record(epoch, split, scores[split], lr=lr, seconds=seconds[split], images=images)
        self._log(epoch, scores["train"], scores["test"], lr=lr, seconds=sum(seconds.values()), done=done, best=best)

    def _record(self, epoch: int, split: str, values: Mapping[str, float], *, lr: float, seconds: float, images: float) -> None:
        rate = images / max(seconds, 1e-9)
        values = {name: value for name, value in values.items() if name != "images"}
        self.run.record({"epoch": epoch, "split": split, **values, "lr": lr, "seconds": seconds, "images_per_second": rate})

    def _log(
        self,
        epoch: int,
        train: Mapping[str, float],
        test: Mapping[str, float],
        *,
        lr: float,
        seconds: float,
        done: float,
        best: Mapping[str, float],
    ) -> None:
        steps = self.data.train_steps
        left = (self.n_epochs - epoch - 1) * seconds * steps / max(done * steps, 1)
        rate = done * self.data.train_images / seconds
        cells = {"epoch": f"{epoch + 1}/{self.n_epochs}", "lr": f"{lr:.3g}", "loss": _loss(train["loss"])}
        if len(train.keys() - {"top1", "top5", "images"}) > 2:  # a sum: other terms beside the cross-entropy
            cells["CE"] = _loss(train["ce"]) if "ce" in train else ""
        cells |= {"top1": f"{train['top1']:.2f}", "test CE": _loss(test["loss"]), "test top1": f"{test['top1']:.2f}"}
        cells |= {heading: f"{test[name]:.2f}" for name, heading in NOT_SHIPPED.items() if name in test}
        if len(self.data.dataset.classes) >= FEWEST_CLASSES_OF_TOP5:
            cells["test top5"] = f"{test['top5']:.2f}"
        cells |= {"best": f"{best['top1']:.2f}", "img/s": f"{rate:.0f}", "s": f"{seconds:.1f}", "left": _clock(left)}
        cells = _fitting(cells)
        if not self._has_heading:
            self.run.log("\n".join(" ".join(words).rstrip() for words in zip(*map(_heading, cells), strict=True)))
            self._has_heading = True
        self.run.log(" ".join(f"{cell:>{WIDTHS.get(name, 6)}}" for name, cell in cells.items()))


def _heading(name: str) -> tuple[str, str]:
    """The two lines over a column."""
    upper, _, lower = name.rpartition(" ")
    width = WIDTHS.get(name, 6)
    return f"{upper[:width]:>{width}}", f"{lower:>{width}}"


def _fitting(cells: Mapping[str, str]) -> dict[str, str]:
    """The columns that a line of a terminal has room for: what is least asked for goes first."""
    kept = dict(cells)
    for name in ("img/s", "test top5", "CE"):
        if sum(max(WIDTHS.get(column, 6), len(cell)) + 1 for column, cell in kept.items()) - 1 > LINE_CHARACTERS:
            kept.pop(name, None)
    return kept


def _loss(value: float) -> str:
    """A mean loss in at most six characters."""
    return f"{value:.4g}" if value >= 1000 else f"{value:.4f}"[:6]


def log_beginning(run: Run, data: ImageData, *, recipe: str) -> None:
    """Logs what a run works on and how: the images of each class, their size and values, the recipe, the folder."""
    dataset = data.dataset
    counts = torch.bincount(dataset.train.labels.cpu(), minlength=len(dataset.classes)).tolist()
    splits = f"{len(dataset.train.labels)} training and {len(dataset.test.labels)} test images"
    mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (dataset.mean, dataset.std))
    run.log(f"images: {splits}, {sized(dataset.image_size)}, mean {mean}, std {std}")
    run.log(f"classes: {_by_class(dataset.classes, counts)}")
    run.log(f"recipe: {recipe}")
    run.log(f"writes to: {run.folder}")


def _by_class(names: Sequence[str], counts: Sequence[int]) -> str:
    """How many training images each class has, or where they are many the smallest and the largest."""
    if len(names) <= MOST_CLASSES_SHOWN:
        return f"{len(names)}, training images of each: " + ", ".join(
            f"{printable(name, 20)} {count}" for name, count in zip(names, counts, strict=True)
        )
    least, most = min(range(len(names)), key=counts.__getitem__), max(range(len(names)), key=counts.__getitem__)
    extremes = " to ".join(f"{counts[row]} ({printable(names[row], 20)})" for row in (least, most))
    return f"{len(names)}, {extremes} training images each"


def log_end(run: Run, result: Mapping[str, Any], *, written: Path, following: Sequence[str]) -> None:
    """Logs how a run ended and what to type now; `result` is what the training gave, `following` a script and its flags."""
    last, best = (result[name]["top1"] for name in ("last", "best"))
    run.log(f"done: last top1 {last:.2f}, best {best:.2f}, {run.seconds() / 60:.1f} minutes of epochs -> {written}")
    run.log(f"next: {shlex.join([interpreter(), *following])}")


def gain_lines(comparison: Mapping[str, Any], *, relayouts: int) -> list[str]:
    """How many times smaller and faster, from a comparison of `utils.profile`, with a hint where nothing is gained in time."""
    dense, small = comparison["dense"], comparison["compact"]
    bytes_ratio, macs_ratio = (dense[name] / small[name] for name in ("file_bytes", "macs"))
    speeds = {size: dense["latency"][size]["median_ms"] / small["latency"][size]["median_ms"] for size in dense["latency"]}
    times = ", ".join(f"{speed:.2f} at batch {size}" for size, speed in speeds.items())
    lines = [f"times smaller: {bytes_ratio:.2f} (MACs {macs_ratio:.2f}); times faster: {times}"]
    slow = {size: speed for size, speed in speeds.items() if speed < 1 < macs_ratio}
    for size, speed in list(slow.items())[:1]:
        why = f"{relayouts} steps between layers that store different channels" if relayouts else "widths that fill no vector"
        lines.append(
            f"hint: {1 / macs_ratio:.2f} of the MACs, but {speed:.2f} of the speed at batch {size}: {why}; "
            "try --couple-channels --channel-multiple 8"
        )
    return lines


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
