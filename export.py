"""Writes the small network of a checkpoint as ONNX, in float or int8, as a torch.export program, or as Python source."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.settings import FORMAT_NAMES, INT8_TARGETS, output_paths
from models import check_model
from utils import cli
from utils.errors import UserError, naming
from utils.files import check_output, write_atomic
from utils.images.settings import DataSettings
from utils.runs.found import SHIPPED

if TYPE_CHECKING:
    from torch import nn

    from deploy.exporters import Provenance
    from models.narrow import NarrowNetwork
    from models.network_file import NetworkFile
    from utils.images.batches import ImageData

SCRIPT = "export.py"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Write the small network of a checkpoint in a form that others run.")
    parser.add_argument(
        "--load-path", type=cli.network_path(SHIPPED), metavar="FILE", help="checkpoint: dense, pruned or compact"
    )
    parser.add_argument("--model", metavar="NAME",
                        help="its network (default: the one that its file names, unless that is FILE.py:FUNCTION)")  # fmt: skip
    parser.add_argument("--format", default="onnx", choices=FORMAT_NAMES, help="what to write")
    parser.add_argument("--output", metavar="FILE", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    int8 = parser.add_argument_group("eight bits")
    int8.add_argument("--int8", action="store_true", help="ONNX that computes in int8")
    int8.add_argument("--calibration-images", type=cli.positive_int, default=512, metavar="N",
                      help="training images that show between which bounds activations lie")  # fmt: skip
    int8.add_argument("--int8-tolerance", type=cli.non_negative_float, default=0.5, metavar="POINTS",
                      help="top-1 accuracy that int8 may cost")  # fmt: skip
    int8.add_argument("--int8-for", default="any", choices=tuple(INT8_TARGETS),
                      help="processors: any has weights of 7 bits; vnni has 8, which overflow on x86 without VNNI")  # fmt: skip
    cli.add_config_flag(parser)
    cli.add_data_flags(parser)
    parser.counts_only("int8", where=lambda args: args.format == "onnx", only="with --format onnx")
    parser.counts_only("calibration_images", "int8_tolerance", "int8_for", where=lambda args: args.int8, only="with --int8")
    parser.checks["model"] = check_model
    parser.parameters["tolerance"] = "int8_tolerance"
    return parser


def main(args: argparse.Namespace) -> None:
    cli.require(args, "load_path", "output")
    check_outputs(args.format, Path(args.output), force=args.force)

    from deploy.exporters import EXPORTERS
    from deploy.int8_export import export_int8
    from deploy.measures import exported_difference, speed_table
    from models.int8 import Int8Network
    from models.network_file import load_network
    from prune.compact import TOLERANCE, relative_difference
    from utils.training.evaluation import check_score, evaluate, print_remarks

    named = f"--load-path {args.load_path}"
    file = load_network(args.load_path, flag="--load-path", model=args.model)
    data = fitting_data(cli.settings_of(DataSettings, args), file, origin=named, test_only=not args.int8)
    dense, small = dense_and_small(file, data, origin=named)
    scores = {}
    for role, network in (("dense", dense), ("compact", small)):
        result = evaluate(network, data)
        check_score(result, origin=named)
        scores[role] = result["top1"]
    difference = relative_difference(dense, small, (batch.images for batch in data.test_batches()))
    check_difference(named, "compact", difference, tolerance=TOLERANCE)
    provenance = provenance_of(file, data, Path(args.load_path), top1=scores["compact"])
    print_remarks(data)
    print(f"top1 on {data.dataset.name}: " + ", ".join(f"{role} {top1:.2f}" for role, top1 in scores.items()))

    if args.int8:
        with naming(named):
            bits = INT8_TARGETS[args.int8_for]
            simulated = Int8Network.with_ranges(small, file.int8, weight_bits=bits).requires_grad_(False) if file.int8 else None
        asked = {"images": args.calibration_images, "tolerance": args.int8_tolerance, "weight_bits": bits}
        content, remark = export_int8(dense, small, simulated, data, provenance=provenance, **asked)
        files = {Path(args.output).suffix: content}
    else:
        export = EXPORTERS[args.format](dense, small, data.example, provenance=provenance, output=Path(args.output))
        difference = exported_difference(small, export.run, data)
        check_difference(named, "exported", difference, tolerance=0.0 if export.exact else TOLERANCE)
        print(f"largest difference of the logits, relative to the largest: exported {difference:.1e}")
        print(speed_table(dense, small, export.run, data.example[:1], name=export.runtime))
        files, remark = export.files, export.remark
    if remark:
        print(remark)
    for suffix, content in files.items():
        path = Path(args.output).with_suffix(suffix)
        write_atomic(path, content)
        print(f"{file.model}: {len(content):,} bytes -> {path}")


def check_outputs(form: str, output: Path, *, force: bool) -> None:
    """Raises UserError for files that exist, unless `force`, and where none can be written."""
    if form == "python" and output.suffix != ".py":
        raise UserError(f"--output {output}: Python source needs a name that ends in .py")
    for path in output_paths(form, output):
        check_output(path, force=force)


def fitting_data(settings: DataSettings, file: NetworkFile, *, origin: str, test_only: bool) -> ImageData:
    """The images, on the CPU where the network is traced; it runs anywhere. Raises UserError if it is not fit for them."""
    import torch

    from utils.images.loading import check_classes, check_images, load_images
    from utils.world import World

    place = {"device": torch.device("cpu"), "world": World()}
    data = load_images(settings, seed=0, **place, files={origin: file.images}, test_only=test_only)
    check_classes(file.num_classes, data, origin=origin, remark=file.remark)
    check_images(file.network, data, origin=origin)
    return data


def dense_and_small(file: NetworkFile, data: ImageData, *, origin: str) -> tuple[nn.Module, NarrowNetwork]:
    """The network of a file at full width, with zeros where filters are gone, and without its zero filters."""
    from models.network_file import as_dense
    from prune.compact import check_zeros_of, compact

    check_zeros_of(file, origin=origin)
    if not file.compact:
        return file.network, compact(file.network, data.example)
    return as_dense(file).network, file.network


def check_difference(origin: str, step: str, found: float, *, tolerance: float) -> None:
    """Raises UserError unless a step has changed the logits by no more than `tolerance`, relative to the largest."""
    if not found <= tolerance:
        raise UserError(
            f"{origin}: the {step} network differs from the one before it by {found:.1e} of the "
            f"largest logit, {tolerance} is allowed; nothing was written"
        )


def provenance_of(file: NetworkFile, data: ImageData, path: Path, *, top1: float) -> Provenance:
    """What the exported file says of itself: its run is the folder that its checkpoint lies in."""
    from deploy.exporters import Provenance
    from utils.runs.folder import CONFIG

    path = path.resolve()
    run = path.parent.name if (path.parent / CONFIG).exists() else path.name
    return Provenance(file.model, data.dataset.images, run, data.dataset.name, top1)


if __name__ == "__main__":
    cli.run_script(get_args_parser, main)
