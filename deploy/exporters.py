"""The forms in which a small network leaves this repository: ONNX, in float or int8, a torch.export program, Python source."""

import io
import json
import math
import tempfile
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from deploy.onnx import any_batch, to_onnx, unread_parts
from deploy.runtimes import Runner, median_seconds, onnxruntime_session, repeated
from deploy.settings import SAFETENSORS
from deploy.source import network_source
from models.graph import ChannelGraph
from models.narrow import NarrowNetwork, Selection
from utils.images.preparation import describe_preparation
from utils.images.spec import ImageSpec
from utils.profile import LATENCY_BATCH_SIZES, profile_network

FORM_ROUNDS = 9  # in which the forms of a network are compared


@dataclass(frozen=True)
class Provenance:
    """Where a network comes from, for those who meet its file: what it is called, its images, run and accuracy."""

    model: str
    images: ImageSpec
    run: str
    dataset: str
    top1: float
    more: Mapping[str, object] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """JSON by name."""
        preparation = describe_preparation(self.images.image_size)
        said = {
            "model": self.model,
            "run": self.run,
            "dataset": self.dataset,
            "top1": round(self.top1, 4),
            **self.more,
            "preprocessing": preparation,
        }
        return {name: json.dumps(value, ensure_ascii=False) for name, value in {**said, **self.images.as_fields()}.items()}


@dataclass(frozen=True)
class Export:
    """Files by their names' endings (one of them --output's own), what runs them and its name, and what to say of them.

    `exact`: the logits must be those of the small network bit for bit.
    """

    files: dict[str, bytes]
    runtime: str
    run: Callable[[Tensor], Tensor]
    remark: str = ""
    exact: bool = False


def export_onnx(dense: nn.Module, small: NarrowNetwork, images: Tensor, *, provenance: Provenance, output: Path) -> Export:
    """ONNX, run by onnxruntime.

    Where sums of different channels need a new layout, there are two forms of the same function (docs/architecture.md): both are
    measured, and the faster one is written.
    """
    forms = forms_of(dense, small, images)
    contents = {form: to_onnx(network, images, metadata=provenance.metadata()) for form, network in forms.items()}
    runners = {form: onnxruntime_session(content) for form, content in contents.items()}
    form, remark = fastest_form(runners, images)
    remarks = [remark] if remark else []
    if odd := unread_parts(contents[form]):
        remarks.append(f"other programs run this file, predict.py does not: it has {odd}")
    return Export({output.suffix: contents[form]}, "onnxruntime", runners[form], "; ".join(remarks))


def forms_of(dense: nn.Module, small: NarrowNetwork, images: Tensor) -> dict[str, NarrowNetwork]:
    """The forms in which the small network may be written, by what they do with sums of different channels.

    `images` are for networks whose Python asks for sizes.
    """
    if not small.relayout_count:
        return {"as it is": small.eval()}
    wide = Selection.from_json(ChannelGraph(dense, images), small.kept).shrink(wide_sums=True)
    return {"layouts between layers": small.eval(), "plain sums of wide layers": wide.eval()}


def fastest_form(runners: Mapping[str, Runner], images: Tensor) -> tuple[str, str]:
    """The form with the lowest product of its times at all batch sizes, and a sentence on what was measured."""
    if len(runners) == 1:
        return next(iter(runners)), ""
    seconds = {size: median_seconds(runners, repeated(images, size), rounds=FORM_ROUNDS) for size in LATENCY_BATCH_SIZES}
    fastest = min(runners, key=lambda form: math.prod(times[form] for times in seconds.values()))
    measured = "; ".join(
        f"batch {size}: " + ", ".join(f"{form} {1000 * times[form]:.2f} ms" for form in runners)
        for size, times in seconds.items()
    )
    return fastest, f"written with {fastest}, the faster form ({measured})"


def export_program(dense: nn.Module, small: NarrowNetwork, images: Tensor, *, provenance: Provenance, output: Path) -> Export:
    """A torch.export program (.pt2), run by PyTorch; the metadata lie beside it as torch.export's `extra_files`."""
    program = torch.export.export(small.bare(), (images,), dynamic_shapes=(any_batch(),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=provenance.metadata())
    return Export({output.suffix: buffer.getvalue()}, "exported", program.module())


def export_source(dense: nn.Module, small: NarrowNetwork, images: Tensor, *, provenance: Provenance, output: Path) -> Export:
    """Python source with its weights beside it in a .safetensors file, run by PyTorch."""
    weights = output.with_suffix(SAFETENSORS).name
    size = profile_network(small, images[:1])
    height, width = provenance.images.image_size
    title = (
        f"{provenance.model} for {len(provenance.images.class_names)} classes, images of {width}x{height}.\n\n"
        f"{size['parameters']:,} parameters, {size['macs']:,} multiply-accumulates an image; top-1 {provenance.top1:.2f} % on "
        f"{provenance.dataset}; from the run {provenance.run}."
    )
    source = network_source(small, title=title, images=provenance.images, weights=weights)
    files = {SAFETENSORS: safetensors.torch.save(source.tensors), output.suffix: source.text.encode()}
    return Export(files, "source", load_source(files, output), exact=True)


def load_source(files: Mapping[str, bytes], output: Path) -> nn.Module:
    """The network that the `load` of the source gives, as its users will have it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, output.name)
        for suffix, content in files.items():
            path.with_suffix(suffix).write_bytes(content)
        module = types.ModuleType(output.stem)
        module.__file__ = str(path)
        exec(compile(files[output.suffix], str(path), "exec"), vars(module))
        return module.load()


EXPORTERS = {"onnx": export_onnx, "pt2": export_program, "python": export_source}
