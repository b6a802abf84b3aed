"""What a network says of images in files: their most probable classes, batch by batch."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from utils.errors import ParameterError, UserError, printable
from utils.images.batches import Normaliser
from utils.images.decoding import read_image
from utils.images.preparation import test_transform
from utils.images.spec import CHANNELS, ImageSpec


@dataclass(frozen=True)
class Predictor:
    """`logits` gives the logits (N, classes) of normalised images (N, 3, H, W) on `device`, which look as `images` says."""

    logits: Callable[[Tensor], Tensor]
    images: ImageSpec
    device: torch.device


@torch.inference_mode()
def with_image_size(predictor: Predictor, size: tuple[int, int]) -> Predictor:
    """The same network for images of another height and width. Raises ParameterError if it cannot take them."""
    try:
        predictor.logits(torch.zeros(1, CHANNELS, *size, device=predictor.device))
    except Exception as error:  # networks refuse a size in any way: by an assertion, a shape that does not fit
        reason = printable(str(error).partition("\n")[0])
        raise ParameterError("image_size", f"{size[0]}x{size[1]}", f"the network cannot take such images ({reason})") from error
    return replace(predictor, images=replace(predictor.images, image_size=size))


@torch.inference_mode()
def predictions(
    predictor: Predictor, paths: Sequence[str], *, batch_size: int, top: int
) -> Iterator[tuple[str, list[tuple[str, float]] | UserError]]:
    """Each path with its most probable classes and their probabilities, or with what keeps it from being read.

    Raises UserError for a network whose logits are no finite numbers.
    """
    transform, normalise = test_transform(predictor.images.image_size), Normaliser(predictor.images, predictor.device)

    def read(path: str) -> Tensor | UserError:
        try:
            return transform(read_image(path, grey_bits=predictor.images.grey_bits))
        except UserError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(paths), unit="image", disable=None, leave=False) as bar:
        for begin in range(0, len(paths), batch_size):
            batch = paths[begin : begin + batch_size]
            images = list(pool.map(read, batch))
            good = [image for image in images if isinstance(image, Tensor)]
            rows = iter(())
            if good:
                logits = predictor.logits(normalise(torch.stack(good).to(predictor.device)))
                if not logits.isfinite().all():
                    raise UserError("the network of --load-path gives logits that are NaN or infinite")
                rows = iter(zip(*logits.softmax(1).cpu().topk(top), strict=True))
            for path, image in zip(batch, images, strict=True):
                if isinstance(image, UserError):
                    yield path, image
                    continue
                values, classes = next(rows)
                names = [predictor.images.class_names[number] for number in classes.tolist()]
                yield path, list(zip(names, values.tolist(), strict=True))
            bar.update(len(batch))
