"""Names the classes of images, with any network that this repository wrote: a checkpoint, an archive or an ONNX file."""

import argparse
import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from deploy.onnx_file import SUFFIX, read_onnx
from models import check_model
from models.network_file import load_network
from quantize.archive import read_flagged
from utils import cli
from utils.errors import UserError, printable
from utils.files import check_output, is_archive, write_atomic
from utils.images.batches import Normaliser, test_transform
from utils.images.datasets import read_image
from utils.images.spec import ImageSpec
from utils.training import setup
from utils.world import World

SCRIPT = "predict.py"
SHOWN_PATH = 200  # characters


@dataclass(frozen=True)
class Predictor:
    """`logits` gives the logits (N, classes) of normalised images (N, 3, H, W) on `device`, which look as `images` says."""

    logits: Callable[[Tensor], Tensor]
    images: ImageSpec
    device: torch.device


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog=SCRIPT, description="Name the classes of images.")
    parser.add_argument("paths", nargs="*", metavar="IMAGE", help="images, or folders, which are searched for images")
    parser.add_argument("--load-path", metavar="FILE", help="the network: a checkpoint, an archive or an ONNX file of export.py")
    parser.add_argument("--model", type=cli.checked(check_model), metavar="NAME",
                        help="its network (default: the one that its file names, unless that is FILE.py:FUNCTION)")  # fmt: skip
    parser.add_argument("--top", type=cli.positive_int, default=1, metavar="N", help="how many classes to name for an image")
    parser.add_argument("--output", metavar="FILE.csv", help="write a table instead of printing lines")
    parser.add_argument("--force", action="store_true", help="replace an existing --output")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="images at a time")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA where there is a device")
    parser.counts_only("force", where=lambda args: args.output is not None, only="with --output")
    parser.counts_only("model", "device", where=lambda args: not is_onnx(args.load_path), only="with a checkpoint or an archive")
    return parser


def main(args: argparse.Namespace) -> None:
    cli.require(args, "load_path")
    if not args.paths:
        raise UserError("IMAGE: name images, or folders of images")
    if args.output is not None:
        check_output(Path(args.output), force=args.force)
    paths = image_paths(args.paths)
    predictor = load_predictor(args)
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
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(paths)} images could not be read: {unreadable[0]}")


def is_onnx(path: str | None) -> bool:
    return path is not None and path.lower().endswith(SUFFIX)


def image_paths(given: Sequence[str]) -> list[str]:
    """The images among files and below folders, in order. Raises UserError for a path that is neither, or holds none."""
    found: list[str] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            below = sorted(str(own) for own in path.rglob("*") if own.suffix.lower() in IMG_EXTENSIONS and own.is_file())
            if not below:
                raise UserError(f"IMAGE {printable(name, SHOWN_PATH)}: the folder holds no image ({', '.join(IMG_EXTENSIONS)})")
            found += below
        elif path.is_file():
            found.append(name)
        else:
            raise UserError(f"IMAGE {printable(name, SHOWN_PATH)}: there is no such file or folder")
    return found


def load_predictor(args: argparse.Namespace) -> Predictor:
    """The network of --load-path. Raises UserError for a file that is none, or that does not say how its images must look."""
    origin = f"--load-path {args.load_path}"
    if args.load_path.lower().endswith(".pt2"):
        raise UserError(f"{origin}: opening a .pt2 file can run code; export the network as ONNX")
    if is_onnx(args.load_path):
        file = read_onnx(args.load_path, flag="--load-path")
        return Predictor(file.run, file.images, torch.device("cpu"))
    device = setup.choose_device(args.device, None, World())
    if is_archive(args.load_path):
        network, about = read_flagged(args.load_path, flag="--load-path", model=args.model)
        images = about.images
    else:
        file = load_network(args.load_path, flag="--load-path", model=args.model)
        network, images = file.network, file.images
    if images is None:
        raise UserError(f"{origin}: does not say how its images must look and what its classes are called")
    return Predictor(setup.to_device(network, device).eval(), images, device)


@torch.inference_mode()
def predictions(
    predictor: Predictor, paths: Sequence[str], *, batch_size: int, top: int
) -> Iterator[tuple[str, list[tuple[str, float]] | UserError]]:
    """Each path with its most probable classes and their probabilities, or with what keeps it from being read."""
    transform, normalise = test_transform(predictor.images.image_size), Normaliser(predictor.images, predictor.device)

    def read(path: str) -> Tensor | UserError:
        try:
            return transform(read_image(path))
        except UserError as error:
            return UserError(str(error).removeprefix("--data-dir: "))

    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(paths), unit="image", disable=None, leave=False) as bar:
        for begin in range(0, len(paths), batch_size):
            batch = paths[begin : begin + batch_size]
            images = list(pool.map(read, batch))
            good = [image for image in images if isinstance(image, Tensor)]
            rows = iter(())
            if good:
                logits = predictor.logits(normalise(torch.stack(good).to(predictor.device)))
                rows = iter(zip(*logits.softmax(1).cpu().topk(top), strict=True))
            for path, image in zip(batch, images, strict=True):
                if isinstance(image, UserError):
                    yield path, image
                    continue
                values, classes = next(rows)
                names = [predictor.images.class_names[number] for number in classes.tolist()]
                yield path, list(zip(names, values.tolist(), strict=True))
            bar.update(len(batch))


def as_csv(rows: Sequence[Sequence[str]], top: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *(name for place in range(1, top + 1) for name in (f"class_{place}", f"probability_{place}"))])
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    cli.execute(lambda: main(cli.parse_flags(get_args_parser())))
