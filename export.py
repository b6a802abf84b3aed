"""Writes the small network of a checkpoint as ONNX, in float or int8, as a torch.export program, or as Python source."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deploy.comparison import measure_files, table
from deploy.exporters import EXPORTERS, Origin, fastest_form, forms_of, output_paths
from deploy.int8 import to_int8_onnx
from deploy.onnx import to_onnx, with_metadata
from deploy.runtimes import SESSIONS, onnxruntime_session
from models import check_model
from models.difference import ResultDifference
from models.int8 import Int8Network
from models.narrow import NarrowNetwork, narrow
from models.network_file import NetworkFile, as_dense, load_network
from prune.compact import TOLERANCE, check_pruned_zeros, compact, relative_difference
from utils import cli
from utils.errors import UserError, naming
from utils.files import check_output, write_atomic
from utils.images.batches import ImageData
from utils.profile import latencies, profile_network
from utils.runs.folder import CONFIG
from utils.training import setup
from utils.training.engine import evaluate
from utils.world import World

SCRIPT = "export.py"


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Write the small network of a checkpoint in a form that others run.")
    parser.add_argument("--load-path", metavar="FILE", help="checkpoint: dense, pruned or compact")
    parser.add_argument("--model", type=cli.checked(check_model), metavar="NAME",
                        help="its network (default: the one that its file names, unless that is FILE.py:FUNCTION)")  # fmt: skip
    parser.add_argument("--format", default="onnx", choices=EXPORTERS, help="what to write")
    parser.add_argument("--output", metavar="FILE", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    int8 = parser.add_argument_group("eight bits")
    int8.add_argument("--int8", action="store_true", help="ONNX that computes in int8")
    int8.add_argument("--calibration-images", type=cli.positive_int, default=512, metavar="N",
                      help="training images that show between which bounds activations lie")  # fmt: skip
    int8.add_argument("--int8-tolerance", type=cli.non_negative_float, default=0.5, metavar="POINTS",
                      help="top-1 accuracy that int8 may cost")  # fmt: skip
    cli.add_data_flags(parser)
    parser.counts_only("int8", where=lambda args: args.format == "onnx", only="with --format onnx")
    parser.counts_only("calibration_images", "int8_tolerance", where=lambda args: args.int8, only="with --int8")
    parser.set_defaults(seed=0, dry_run=False)
    return parser


def main(args: argparse.Namespace) -> None:
    cli.require(args, "load_path", "output")
    check_outputs(args)
    args.evaluate = not args.int8  # which needs training images
    device = torch.device("cpu")  # where the file is traced; it runs anywhere
    named = f"--load-path {args.load_path}"
    file = load_network(args.load_path, flag="--load-path", model=args.model)
    data = setup.load_data(args, device=device, world=World(), files={named: file.images})
    setup.check_classes(file.num_classes, data, origin=named)
    setup.check_images(file.network, data, origin=named)
    dense, small = dense_and_small(file, data, path=args.load_path)
    scores = {"dense": evaluate(dense, data)["top1"], "compact": evaluate(small, data)["top1"]}
    check_difference(args, "compact", relative_difference(dense, small, (batch.images for batch in data.test_batches())))
    path = Path(args.load_path).resolve()
    run = path.parent.name if (path.parent / CONFIG).exists() else path.name
    origin = Origin(file.model, data.dataset.images, run, data.dataset.name, scores["compact"])
    setup.print_remarks(data)
    print(f"top1 on {data.dataset.name}: " + ", ".join(f"{role} {top1:.2f}" for role, top1 in scores.items()))

    if args.int8:
        files, remark = int8(args, file, dense, small, data, origin)
    else:
        export = EXPORTERS[args.format](dense, small, data.example, origin=origin, output=Path(args.output))
        difference = exported_difference(small, export.run, data)
        check_difference(args, "exported", difference, tolerance=0.0 if export.exact else TOLERANCE)
        print(f"largest difference of the logits, relative to the largest: exported {difference:.1e}")
        print(speed_table(dense, small, export.run, data.example[:1], name=export.runtime))
        files, remark = export.files, export.remark
    if remark:
        print(remark)
    for suffix, content in files.items():
        path = Path(args.output).with_suffix(suffix)
        write_atomic(path, content)
        print(f"{file.model}: {len(content):,} bytes -> {path}")


def check_outputs(args: argparse.Namespace) -> None:
    """Raises UserError for files that exist, and where none can be written."""
    if args.format == "python" and Path(args.output).suffix != ".py":
        raise UserError(f"--output {args.output}: Python source needs a name that ends in .py")
    for output in output_paths(args.format, args.output):
        check_output(output, force=args.force)


def dense_and_small(file: NetworkFile, data: ImageData, *, path: str) -> tuple[nn.Module, NarrowNetwork]:
    """The network of a file at full width, with zeros where filters are gone, and without its zero filters."""
    if not file.compact:
        with naming(f"--load-path {path}"):
            check_pruned_zeros(file.network.state_dict(), file.kept)
        return file.network, compact(file.network, data.example)
    return as_dense(file).network, file.network


def check_difference(args: argparse.Namespace, step: str, found: float, *, tolerance: float = TOLERANCE) -> None:
    if not found <= tolerance:
        raise UserError(
            f"--load-path {args.load_path}: the {step} network differs from the one before it by {found:.1e} of the "
            f"largest logit, {tolerance} is allowed; nothing was written"
        )


def int8(
    args: argparse.Namespace, file: NetworkFile, dense: nn.Module, small: NarrowNetwork, data: ImageData, origin: Origin
) -> tuple[dict[str, bytes], str]:
    """The file of the small network in eight bits by its ending, and what to say of it; prints it beside float and dense ones.

    Raises UserError where it costs more accuracy than --int8-tolerance.
    """
    wide = narrow(dense, {}, example=data.example)
    simulated = simulation_of(file, small, path=args.load_path)
    images = calibration_images(data, args.calibration_images)
    if simulated is not None:
        contents, remark = to_int8_onnx(simulated, data.example, images), ""
    else:
        networks = forms_of(dense, small, data.example)
        forms = {name: to_int8_onnx(network, data.example, images) for name, network in networks.items()}
        form, remark = fastest_form({name: onnxruntime_session(content) for name, content in forms.items()}, data.example)
        contents = forms[form]
    files = {
        "dense, float": to_onnx(wide, data.example),
        SMALL_FLOAT: to_onnx(small, data.example),
        "dense, int8": to_int8_onnx(wide, data.example, images),
        SMALL_INT8: contents,
    }
    rows, predictions = measure_files(files, data)
    print(table(rows))
    print(f"int8 takes {len(contents) / len(files[SMALL_FLOAT]):.3f} of the bytes of float")
    scores = {(row.runtime, row.name): row.top1 for row in rows}
    for runtime in dict.fromkeys(row.runtime for row in rows):
        cost = scores[runtime, SMALL_FLOAT] - scores[runtime, SMALL_INT8]
        if cost > args.int8_tolerance:
            raise UserError(
                f"--int8-tolerance {args.int8_tolerance:g}: int8 costs {cost:.2f} points in {runtime}; fine-tune the network "
                "with quantize_encode.py --quan-mode int8, or allow more; nothing was written"
            )
    if simulated is not None:
        expected = torch.cat([simulated(batch.images).argmax(1) for batch in data.test_batches()])
        same = 100 * float((expected == predictions["onnxruntime", SMALL_INT8]).float().mean())
        print(f"onnxruntime gives the class that was simulated in training to {same:.2f} % of the test images")
    top1 = scores["onnxruntime", SMALL_INT8]
    content = with_metadata(contents, replace(origin, top1=top1, more={"precision": "int8"}).metadata())
    return {Path(args.output).suffix: content}, remark


SMALL_FLOAT, SMALL_INT8 = "small, float", "small, int8"


def simulation_of(file: NetworkFile, small: NarrowNetwork, *, path: str) -> Int8Network | None:
    """What `quantize_encode.py --quan-mode int8` trained; None for a network that was trained in float."""
    if not file.int8:
        return None
    with naming(f"--load-path {path}"):
        return Int8Network.with_ranges(small, file.int8).requires_grad_(False)


def calibration_images(data: ImageData, count: int) -> list[Tensor]:
    """Batches of so many training images, as training shows them."""
    batches, left = [], count
    for batch in data.train_batches("calibration"):
        batches.append(batch.images[:left])
        left -= len(batches[-1])
        if left == 0:
            break
    return batches


@torch.no_grad()
def exported_difference(network: nn.Module, run: Callable[[Tensor], Tensor], data: ImageData) -> float:
    """The largest difference of any logit over the test images, relative to the largest logit of `network`; NaN if one is NaN.

    The images are in plain layout: operations choose their kernels by it, and kernels round in ways of their own.
    """
    difference = ResultDifference()
    for batch in data.test_batches():
        images = batch.images.contiguous()
        difference.add(network(images), run(images))
    return difference.relative


def speed_table(dense: nn.Module, small: nn.Module, run: Callable[[Tensor], Tensor], image: Tensor, *, name: str) -> str:
    """Sizes, and milliseconds of a forward pass on the CPU: dense, compact, exported."""
    sizes = {role: profile_network(network, image) for role, network in (("dense", dense), ("compact", small))}
    lines = [f"{role}: {size['parameters']:,} parameters, {size['macs']:,} MACs" for role, size in sizes.items()]
    times = latencies({"dense": dense, "compact": small, name: run}, image, pausing=name in SESSIONS)
    for batch_size in times["dense"]:
        row = ", ".join(f"{role} {values[batch_size]['median_ms']:.2f} ms" for role, values in times.items())
        lines.append(f"batch {batch_size} on {torch.get_num_threads()} threads: {row}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.execute(lambda: main(cli.parse_flags(get_args_parser())))
