"""Files of networks beside each other, in every runtime that is installed: accuracy, bytes and time."""

import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

import torch

from deploy.runtimes import SESSIONS, Runner, median_seconds, repeated
from utils.images.batches import ImageData
from utils.profile import LATENCY_BATCH_SIZES


class Measured(NamedTuple):
    """A file in a runtime: top-1 accuracy over the test images (%), bytes, and seconds by the number of images at a time."""

    runtime: str
    name: str
    top1: float
    size: int
    seconds: dict[int, float]


def installed_runtimes() -> list[str]:
    return [name for name in SESSIONS if importlib.util.find_spec(name) is not None]


def measure_files(contents: Mapping[str, bytes], data: ImageData) -> tuple[list[Measured], dict[tuple[str, str], torch.Tensor]]:
    """The ONNX files `contents`, by name, and the classes (N,) that each gives the test images, by runtime and name.

    Times are taken in interleaved rounds, over all files in all runtimes.
    """
    runners = {(runtime, name): SESSIONS[runtime](file) for runtime in installed_runtimes() for name, file in contents.items()}
    predictions, labels = predicted_classes(runners, data)
    seconds: dict[int, dict[tuple[str, str], float]] = {}
    for size in LATENCY_BATCH_SIZES:
        seconds[size] = median_seconds(runners, repeated(data.example.cpu(), size))
    rows = [
        Measured(
            runtime,
            name,
            100 * float((predictions[runtime, name] == labels).float().mean()),
            len(contents[name]),
            {size: times[runtime, name] for size, times in seconds.items()},
        )
        for runtime, name in runners
    ]
    return rows, predictions


@torch.no_grad()
def predicted_classes(runners: Mapping[tuple[str, str], Runner], data: ImageData) -> tuple[dict, torch.Tensor]:
    """The classes (N,) that each runner gives the test images, and those that they have."""
    found: dict[tuple[str, str], list[torch.Tensor]] = {key: [] for key in runners}
    labels = []
    for batch in data.test_batches():
        labels.append(batch.labels.cpu())
        for key, run in runners.items():
            found[key].append(run(batch.images.cpu()).argmax(1))
    return {key: torch.cat(parts) for key, parts in found.items()}, torch.cat(labels)


def table(rows: list[Measured]) -> str:
    """The rows as text; times also in units of the first row's of the same runtime."""
    sizes = list(rows[0].seconds)
    heads = ["runtime", "network", "top-1 %", "bytes", *(f"ms, batch {size}" for size in sizes)]
    lines, first = [heads], {}
    for row in rows:
        unit = first.setdefault(row.runtime, row)
        times = [f"{1000 * row.seconds[size]:.2f} ({unit.seconds[size] / row.seconds[size]:.2f}x)" for size in sizes]
        lines.append([row.runtime, row.name, f"{row.top1:.2f}", f"{row.size:,}", *times])
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
