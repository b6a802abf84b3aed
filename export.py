"""Writes the small network of a checkpoint as ONNX or as a torch.export program, checked on real images and timed."""

import argparse
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deploy.onnx import any_batch, to_onnx
from deploy.runtimes import Runner, median_seconds, onnxruntime_session
from models import check_model
from models.narrow import NarrowNetwork, narrow
from models.network_file import NetworkFile, as_dense, load_network
from prune.compact import TOLERANCE, check_pruned_zeros, compact, relative_difference
from utils import cli, setup
from utils.data import ImageData
from utils.engine import evaluate
from utils.errors import UserError, naming
from utils.files import write_atomic
from utils.image_spec import ImageSpec
from utils.profile import LATENCY_BATCH_SIZES, latency, profile_network

SCRIPT = "export.py"
FORM_ROUNDS = 9  # in which the forms of a network are compared


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Write the small network of a checkpoint in a form that others run.")
    parser.add_argument("--load-path", metavar="FILE", help="checkpoint: dense, pruned or compact")
    parser.add_argument("--model", type=cli.checked(check_model), metavar="NAME",
                        help="its network (default: the one that its file names, unless that is FILE.py:FUNCTION)")  # fmt: skip
    parser.add_argument("--format", default="onnx", choices=EXPORTERS, help="what to write")
    parser.add_argument("--output", metavar="FILE", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace an existing --output")
    cli.add_data_flags(parser)
    parser.set_defaults(seed=0, dry_run=False, evaluate=True)
    return parser


def main(args: argparse.Namespace) -> None:
    cli.require(args, "load_path", "output")
    check_output(Path(args.output), force=args.force)
    device = torch.device("cpu")  # where the file is traced; it runs anywhere
    origin = f"--load-path {args.load_path}"
    file = load_network(args.load_path, flag="--load-path", model=args.model)
    data = setup.load_data(args, device=device, world=setup.World(), files={origin: file.images})
    setup.check_classes(file.num_classes, data, origin=origin)
    setup.check_images(file.network, data, origin=origin)
    dense, small = dense_and_small(file, data, path=args.load_path)

    export = EXPORTERS[args.format](dense, small, data.example, metadata=metadata_of(data.dataset.images))
    compaction = relative_difference(dense, small, (batch.images for batch in data.test_batches()))
    difference = exported_difference(small, export.run, data)
    for step, found in (("compact", compaction), ("exported", difference)):
        if not found <= TOLERANCE:
            raise UserError(
                f"--load-path {args.load_path}: the {step} network differs from the one before it by {found:.1e} of the "
                f"largest logit, {TOLERANCE} is allowed; nothing was written"
            )
    write_atomic(args.output, export.content)

    setup.print_remarks(data)
    print(f"largest difference of the logits, relative to the largest: compact {compaction:.1e}, exported {difference:.1e}")
    print(f"top1 on {data.dataset.name}: dense {evaluate(dense, data)['top1']:.2f}, compact {evaluate(small, data)['top1']:.2f}")
    if export.remark:
        print(export.remark)
    print(speed_table(dense, small, export.run, data.example[:1], name=export.runtime))
    print(f"{file.model}: {len(export.content):,} bytes -> {args.output}")


def check_output(output: Path, *, force: bool) -> None:
    if output.exists() and not force:
        raise UserError(f"--output {output}: exists, choose another name or give --force")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: cannot be written, name a file in a folder that you may write to")


def dense_and_small(file: NetworkFile, data: ImageData, *, path: str) -> tuple[nn.Module, NarrowNetwork]:
    """The network of a file at full width, with zeros where filters are gone, and without its zero filters."""
    if not file.compact:
        with naming(f"--load-path {path}"):
            check_pruned_zeros(file.network.state_dict(), file.kept)
        return file.network, compact(file.network, data.example)
    return as_dense(file).network, file.network


def metadata_of(images: ImageSpec) -> dict[str, str]:
    """What a user of the file must know, as JSON by name: class names, image size, mean and standard deviation."""
    return {name: json.dumps(value, ensure_ascii=False) for name, value in images.as_fields().items()}


class Export(NamedTuple):
    """The bytes of a file for any batch size, the name of what runs it, a function of images that does, and what to say of it."""

    content: bytes
    runtime: str
    run: Callable[[Tensor], Tensor]
    remark: str = ""


def export_onnx(dense: nn.Module, small: NarrowNetwork, images: Tensor, *, metadata: Mapping[str, str]) -> Export:
    """ONNX, run by onnxruntime; `metadata` becomes the model's `metadata_props`.

    Where sums of different channels need a new layout, there are two forms of the same function (docs/compaction.md): both are
    measured, and the faster one is written.
    """
    forms = {"as it is": small}
    if small.relayout_count:
        forms = {"layouts between layers": small, "plain sums of wide layers": narrow(dense, small.kept, wide_sums=True)}
    contents = {form: to_onnx(network.eval(), images, metadata=metadata) for form, network in forms.items()}
    runners = {form: onnxruntime_session(content) for form, content in contents.items()}
    form, remark = fastest_form(runners, images)
    return Export(contents[form], "onnxruntime", runners[form], remark)


def fastest_form(runners: Mapping[str, Runner], images: Tensor) -> tuple[str, str]:
    """The form with the lowest product of its times at all batch sizes, and a sentence on what was measured."""
    if len(runners) == 1:
        return next(iter(runners)), ""
    seconds = {
        size: median_seconds(runners, images[:1].expand(size, -1, -1, -1).contiguous(), rounds=FORM_ROUNDS)
        for size in LATENCY_BATCH_SIZES
    }
    fastest = min(runners, key=lambda form: math.prod(times[form] for times in seconds.values()))
    measured = "; ".join(
        f"batch {size}: " + ", ".join(f"{form} {1000 * times[form]:.2f} ms" for form in runners)
        for size, times in seconds.items()
    )
    return fastest, f"written with {fastest}, the faster form ({measured})"


def export_program(dense: nn.Module, small: NarrowNetwork, images: Tensor, *, metadata: Mapping[str, str]) -> Export:
    """A torch.export program (.pt2), run by PyTorch; `metadata` lies beside it as torch.export's `extra_files`."""
    program = torch.export.export(small.bare(), (images,), dynamic_shapes=(any_batch(),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=dict(metadata))
    return Export(buffer.getvalue(), "exported", program.module())


EXPORTERS = {"onnx": export_onnx, "pt2": export_program}


@torch.no_grad()
def exported_difference(network: nn.Module, run: Callable[[Tensor], Tensor], data: ImageData) -> float:
    """The largest difference of any logit over the test images, relative to the largest logit of `network`."""
    difference = largest = 0.0
    for batch in data.test_batches():
        expected = network(batch.images)
        difference = max(difference, float((run(batch.images) - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return difference / largest if largest else difference


def speed_table(dense: nn.Module, small: nn.Module, run: Callable[[Tensor], Tensor], image: Tensor, *, name: str) -> str:
    """Sizes, and milliseconds of a forward pass on the CPU: dense, compact, exported."""
    sizes = {role: profile_network(network, image) for role, network in (("dense", dense), ("compact", small))}
    lines = [f"{role}: {size['parameters']:,} parameters, {size['macs']:,} MACs" for role, size in sizes.items()]
    times = {role: latency(network, image) for role, network in (("dense", dense), ("compact", small), (name, run))}
    for batch_size in times["dense"]:
        row = ", ".join(f"{role} {values[batch_size]['median_ms']:.2f} ms" for role, values in times.items())
        lines.append(f"batch {batch_size} on {torch.get_num_threads()} threads: {row}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.execute(lambda: main(cli.parse_flags(get_args_parser())))
