"""What the benchmarks share: synthetic images, and a report of what they measured with the machine that it is from."""

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils import cli
from utils.files import write_atomic
from utils.images.batches import Batch
from utils.runs.environment import cpu_name, git_sha

RESULTS = Path(__file__).resolve().parent / "results"
IMAGE_SIDE_PIXELS = 32


def add_common_flags(parser: cli.Parser, *, name: str, rounds: int, cpu_only: bool = False) -> None:
    """`--rounds` and `--output`, which every benchmark has, and `--device` unless it is about CPUs."""
    if not cpu_only:
        parser.add_argument(
            "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA where there is a device"
        )
    parser.add_argument("--rounds", type=cli.positive_int, default=rounds, help="measurements of each figure")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="where the JSON goes")


def synthetic_batch(
    size: int, *, device: torch.device, num_classes: int = 10, seed: int = 0, image_side: int = IMAGE_SIDE_PIXELS
) -> Batch:
    """Normal noise (size, 3, image_side, image_side) in the layout of the data pipeline: no step's cost depends on its images."""
    stream = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, image_side, image_side, generator=stream)
    labels = torch.randint(num_classes, (size,), generator=stream)
    return Batch(images.to(device, memory_format=torch.channels_last), labels.to(device), 1)


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit, and how busy the machine was just now."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_vectors": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "commit": git_sha(),
        "measured_at": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, which share their keys, as a Markdown table."""
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(
    benchmark: str, rows: Sequence[Mapping[str, Any]], *, output: Path, machine: Mapping[str, Any], **settings: Any
) -> None:
    """Prints the table of `rows` and the machine, and writes all of it with the settings to `output` as JSON."""
    print_results(rows, machine=machine, **settings)
    write_results(benchmark, rows, output=output, machine=machine, **settings)


def print_results(rows: Sequence[Mapping[str, Any]], *, machine: Mapping[str, Any], **settings: Any) -> None:
    print(table(rows))
    print("; ".join(f"{name} {value}" for name, value in {**machine, **settings}.items()))


def write_results(
    benchmark: str, rows: Sequence[Mapping[str, Any]], *, output: Path, machine: Mapping[str, Any], **settings: Any
) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": benchmark, "machine": dict(machine), "settings": settings, "rows": [dict(row) for row in rows]}
    write_atomic(output, (json.dumps(document, indent=2, default=str) + "\n").encode())
