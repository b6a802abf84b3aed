"""The demo's last words: the network after each of its steps, from the files of the three runs."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """One line of the table; `top1` in percent, `file` what one would pass on."""

    name: str
    top1: float
    parameters: int
    macs: int
    file: Path


def read_stages(trained: Path, pruned: Path, quantized: Path) -> list[Stage]:
    """The three stages, each with the best epoch's accuracy."""
    training, pruning, quantization = map(_summary, (trained, pruned, quantized))
    sizes = pruning["compact"]
    small = (sizes["compact"]["parameters"], sizes["compact"]["macs"])
    return [
        Stage("trained", training["best"]["top1"], training["parameters"], sizes["dense"]["macs"], trained / "model_best.pt"),
        Stage("pruned", pruning["best"]["top1"], *small, pruned / "model_compact.pt"),
        Stage("quantized", quantization["accuracy"]["decoded"]["top1"], *small, quantized / "model.huff"),
    ]


def _summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def format_table(stages: Sequence[Stage]) -> str:
    """The stages as text, each with its size on disk and how many times smaller that is than the first's."""
    sizes = [stage.file.stat().st_size for stage in stages]
    lines = [f"{'':<10}{'top-1 %':>9}{'parameters':>12}{'MACs':>13}{'bytes':>11}{'smaller':>9}  file"]
    for stage, size in zip(stages, sizes, strict=True):
        figures = f"{stage.top1:>9.2f}{stage.parameters:>12,}{stage.macs:>13,}{size:>11,}{sizes[0] / size:>8.1f}x"
        lines.append(f"{stage.name:<10}{figures}  {stage.file}")
    return "\n".join(lines)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=3, type=Path, metavar="RUN", help="the trained, the pruned and the quantized run")
    return parser


if __name__ == "__main__":
    print(format_table(read_stages(*get_args_parser().parse_args().runs)))
