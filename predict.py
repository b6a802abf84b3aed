"""Names the classes of images, with any network that this repository wrote: a checkpoint, an archive or an ONNX file."""

from __future__ import annotations

import argparse
import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.settings import ONNX_SUFFIX
from models import check_model
from utils import cli
from utils.errors import UserError, printable, spreadsheet_text
from utils.files import check_output, is_archive, write_atomic
from utils.images.settings import parsed_size
from utils.runs.found import SHIPPED
from utils.streams import print_error

if TYPE_CHECKING:
    from deploy.predictor import Predictor

SCRIPT = "predict.py"
SHOWN_PATH, SHOWN_BROKEN = 200, 10  # characters, files


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Name the classes of images.")
    parser.add_argument("paths", nargs="*", metavar="IMAGE", help="images, or folders, which are searched for images")
    parser.add_argument(
        "--load-path",
        type=cli.network_path(SHIPPED),
        metavar="FILE",
        help="the network: a checkpoint, an archive or an ONNX file of export.py",
    )
    parser.add_argument("--model", metavar="NAME",
                        help="its network (default: the one that its file names, unless that is FILE.py:FUNCTION)")  # fmt: skip
    parser.add_argument("--top", type=cli.positive_int, default=1, metavar="N", help="how many classes to name for an image")
    parser.add_argument("--output", metavar="FILE.csv", help="write a table instead of printing lines")
    parser.add_argument("--force", action="store_true", help="replace an existing --output")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="images at a time")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA where there is a device")
    parser.add_argument("--image-size", type=cli.checked(parsed_size), metavar="N|HxW",
                        help="bring images to this height and width (default: that of the network's training)")  # fmt: skip
    parser.counts_only("image_size", where=lambda args: not is_onnx(args.load_path),
                       only="with a checkpoint or an archive, an ONNX file takes one size")  # fmt: skip
    parser.counts_only("force", where=lambda args: args.output is not None, only="with --output")
    parser.counts_only("model", "device", where=lambda args: not is_onnx(args.load_path), only="with a checkpoint or an archive")
    parser.checks["model"] = check_model
    return parser


def main(args: argparse.Namespace) -> None:
    cli.require(args, "load_path")
    if not args.paths:
        raise UserError("IMAGE: name images, or folders of images")
    if args.output is not None:
        check_output(Path(args.output), force=args.force)
    paths, left_out = image_paths(args.paths)

    from tqdm import tqdm

    from deploy.predictor import predictions, with_image_size
    from utils.images.folders import describe_left_out

    predictor = load_predictor(args.load_path, model=args.model, device=args.device)
    if args.image_size is not None:
        predictor = with_image_size(predictor, parsed_size(args.image_size))
    top = min(args.top, len(predictor.images.class_names))
    rows, unreadable = [], []
    for path, found in predictions(predictor, paths, batch_size=args.batch_size, top=top):
        if isinstance(found, UserError):
            unreadable.append(str(found))
        elif args.output is None:
            named = ", ".join(f"{printable(name, SHOWN_PATH)} {100 * share:.2f} %" for name, share in found)
            tqdm.write(f"{printable(path, SHOWN_PATH)}: {named}")
        else:
            rows.append([path, *(cell for name, share in found for cell in (name, f"{share:.6f}"))])
    if args.output is not None:
        write_atomic(args.output, as_csv(rows, top).encode(errors="surrogateescape"))
        print(f"{len(rows)} images -> {args.output}")
    if left_out:
        print_error(f"left out, no images: {describe_left_out(left_out)}")
    if unreadable:
        named = "; ".join(unreadable[:SHOWN_BROKEN]) + ("; ..." if len(unreadable) > SHOWN_BROKEN else "")
        raise UserError(f"{len(unreadable)} of {len(paths)} images could not be read: {named}")


def is_onnx(path: str | None) -> bool:
    return path is not None and path.lower().endswith(ONNX_SUFFIX)


def image_paths(given: Sequence[str]) -> tuple[list[str], Counter[str]]:
    """The images among files and below folders, in order, and how many files of which ending in the folders are none.

    Raises UserError for a path that is neither, or holds none.
    """
    from utils.images.folders import describe_left_out, find_images

    found, left_out = [], Counter()
    for name in given:
        path = Path(name)
        if path.is_dir():
            below = find_images(path)
            if not below.paths:
                others = f", but {describe_left_out(below.left_out)}" if below.left_out else ""
                raise UserError(f"IMAGE {printable(name, SHOWN_PATH)}: the folder holds no image{others}")
            found += below.paths
            left_out += below.left_out
        elif path.is_file():
            found.append(name)
        else:
            raise UserError(f"IMAGE {printable(name, SHOWN_PATH)}: there is no such file or folder")
    return found, left_out


def load_predictor(path: str, *, model: str | None, device: str) -> Predictor:
    """The network of a file. Raises UserError for a file that holds none, or that does not say how its images must look."""
    import torch

    from deploy.onnx_file import read_onnx
    from deploy.predictor import Predictor
    from models.network_file import load_network
    from quantize.archive import read_flagged
    from utils.device import choose_device, to_device
    from utils.world import World

    origin = f"--load-path {path}"
    if path.lower().endswith(".pt2"):
        raise UserError(f"{origin}: opening a .pt2 file can run code; export the network as ONNX")
    if is_onnx(path):
        file = read_onnx(path, flag="--load-path")
        return Predictor(file.run, file.images, torch.device("cpu"))
    place = choose_device(device, None, World())
    if is_archive(path):
        network, about = read_flagged(path, flag="--load-path", model=model)
        images = about.images
    else:
        file = load_network(path, flag="--load-path", model=model)
        network, images = file.network, file.images
    if images is None:
        raise UserError(f"{origin}: does not say how its images must look and what its classes are called")
    return Predictor(to_device(network, place).eval(), images, place)


def as_csv(rows: Sequence[Sequence[str]], top: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *(name for place in range(1, top + 1) for name in (f"class_{place}", f"probability_{place}"))])
    writer.writerows([spreadsheet_text(cell) for cell in row] for row in rows)
    return text.getvalue()


if __name__ == "__main__":
    cli.run_script(get_args_parser, main)
