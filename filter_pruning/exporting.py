"""A small network for programs that know nothing of it: ONNX, a torch.export program, or Python source, by the ending."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from deploy.exporters import load_source
from deploy.onnx import any_batch, to_onnx
from deploy.runtimes import onnxruntime_session
from deploy.source import network_source
from models.difference import ResultDifference
from models.narrow import NarrowNetwork
from utils.errors import UserError, shown
from utils.files import write_atomic
from utils.images.spec import ImageSpec
from utils.modes import evaluating

TOLERANCE = 1e-4  # of the largest number of the result
WEIGHTS = ".safetensors"


def export(
    small: NarrowNetwork,
    path: str | os.PathLike,
    example: Tensor,
    *,
    class_names: Sequence[str] = (),
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> list[Path]:
    """Writes `small`, in evaluation, for inputs like `example` (two or more) in any number; gives the files.

    `.onnx` and `.pt2` are one file, `.py` is source with its weights beside it in `.safetensors`, and has class names, mean
    and standard deviation of the images as constants. What was written is run on `example` before, and must agree with `small`
    to 1e-4 of the largest number. Raises PruningError for another ending, a network with several results as ONNX or source, or
    what cannot be written.
    """
    path = Path(path)
    if path.suffix not in _FORMS:
        raise UserError(f"path {shown(str(path))}: must end in {', '.join(_FORMS)}")
    if not isinstance(example, Tensor) or len(example) < 2:
        raise UserError("example: a tensor of two or more inputs expected, so that files take any number of them")
    spec = ImageSpec(tuple(class_names), tuple(example.shape[2:]), tuple(mean), tuple(std))
    with evaluating(small), torch.no_grad():
        expected = small(example)
        files, run = _FORMS[path.suffix](small, example, path, spec)
        difference = ResultDifference()
        difference.add(expected, run(example))
    if not difference.relative <= TOLERANCE:
        raise UserError(
            f"path {shown(str(path))}: what would be written differs by {difference.relative:.1e} of the largest number"
        )
    for suffix, content in files.items():
        write_atomic(path.with_suffix(suffix), content)
    return [path.with_suffix(suffix) for suffix in files]


Form = tuple[Mapping[str, bytes], Callable[[Tensor], Any]]


def _onnx(small: NarrowNetwork, example: Tensor, path: Path, spec: ImageSpec) -> Form:
    if not isinstance(small(example), Tensor):
        raise UserError("small: gives several results, which are not written as ONNX; choose .pt2")
    content = to_onnx(small, example)
    return {path.suffix: content}, onnxruntime_session(content)


def _program(small: NarrowNetwork, example: Tensor, path: Path, spec: ImageSpec) -> Form:
    program = torch.export.export(small.bare(), (example,), dynamic_shapes=(any_batch(),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return {path.suffix: buffer.getvalue()}, program.module()


def _source(small: NarrowNetwork, example: Tensor, path: Path, spec: ImageSpec) -> Form:
    source = network_source(small, title=f"{path.stem}, a pruned network.", images=spec, weights=path.with_suffix(WEIGHTS).name)
    files = {WEIGHTS: safetensors.torch.save(source.tensors), path.suffix: source.text.encode()}
    network: nn.Module = load_source(files, path)
    return files, network


_FORMS = {".onnx": _onnx, ".pt2": _program, ".py": _source}
