"""In which forms a network leaves this repository and what runs it, without anything that has to be imported for it."""

import os
from dataclasses import dataclass
from pathlib import Path

RUNTIME_NAMES = ("torch", "onnxruntime", "openvino")  # `deploy.runtimes` has them
FORMAT_NAMES = ("onnx", "pt2", "python")  # `deploy.exporters` writes them
INT8_TARGETS = {"any": 7, "vnni": 8}  # bits of a weight that a processor multiplies by uint8 without overflow
ONNX_SUFFIX, SAFETENSORS = ".onnx", ".safetensors"


@dataclass(frozen=True)
class LatencySettings:
    """What a budget of time is measured in, or the file `table` that another run has measured."""

    runtime: str = "torch"
    batch_size: int = 64
    threads: int | None = None
    table: str | None = None


def output_paths(form: str, output: str | os.PathLike) -> list[Path]:
    """The files that an export in this form leaves."""
    return [Path(output).with_suffix(suffix) for suffix in ([SAFETENSORS] if form == "python" else [])] + [Path(output)]
