"""How right a network is over the test images of all processes."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError
from utils.images.batches import ImageData
from utils.training.classes import class_lines, confusion_of
from utils.training.hits import TestHits, gather_hits
from utils.training.metrics import Sums
from utils.training.step import autocast


class Evaluation(NamedTuple):
    """Of one network: its `scores`, as `evaluate` gives them, which images are `hits`, and the `confusion` of its classes.

    `confusion` (C, C) int64, on the CPU, counts the test images of each class, a row, by the class that the network gave them.
    """

    scores: dict[str, float]
    hits: TestHits
    confusion: Tensor


@torch.no_grad()
def evaluate(network: nn.Module, data: ImageData, *, amp: bool = False) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy in percent over the test images of all processes; the network's mode is kept."""
    return _evaluate(network, data, amp=amp).sums.read()


@torch.no_grad()
def evaluate_each(network: nn.Module, data: ImageData, *, amp: bool = False) -> Evaluation:
    """As `evaluate`, and image by image, over all processes."""
    found = _evaluate(network, data, amp=amp)
    scores, hits = found.sums.read(), gather_hits(found.labels, found.hits, data.world)
    return Evaluation(scores, hits, confusion_of(found.labels, found.predictions, num_classes=found.num_classes))


class _Pass(NamedTuple):
    """This process's part of the test images: what it adds up to, and batch by batch labels, hits and predicted classes."""

    sums: Sums
    labels: list[Tensor]
    hits: list[Tensor]
    predictions: list[Tensor]
    num_classes: int


def _evaluate(network: nn.Module, data: ImageData, *, amp: bool) -> _Pass:
    was_training = network.training
    network.eval()
    sums, all_labels, hits, predictions, num_classes = Sums(data.device), [], [], [], len(data.dataset.classes)
    for images, labels, *_ in data.test_batches():
        with autocast(data.device, amp):
            logits = network(images)
        hits.append(sums.add({"loss": F.cross_entropy(logits.float(), labels)}, logits, labels))
        all_labels.append(labels)
        predictions.append(torch.where(hits[-1], labels, logits.argmax(1)))
        num_classes = logits.shape[1]
    network.train(was_training)
    return _Pass(sums, all_labels, hits, predictions, num_classes)


def check_score(result: Mapping[str, float], *, origin: str) -> None:
    """Raises UserError for the result of `evaluate` of a network that gave NaN or infinite logits."""
    if not math.isfinite(result["loss"]):
        raise UserError(f"{origin}: gives logits that are NaN or infinite for some of the test images, it has no accuracy")


def print_score(model: str, data: ImageData, found: Evaluation) -> None:
    """The accuracy of a network, after what a user should know of the images that it was given; see `check_score`.

    The classes that it knows worst follow.
    """
    result = found.scores
    check_score(result, origin=f"{model} on {data.dataset.name}")
    if data.world.is_main:
        print_remarks(data)
        print(
            f"{model} on {data.dataset.name}: loss {result['loss']:.4f}, top1 {result['top1']:.2f}, top5 {result['top5']:.2f} "
            f"over {result['images']} images"
        )
        print("\n".join(class_lines(found.confusion, data.dataset.classes)))


def print_remarks(data: ImageData) -> None:
    for remark in data.remarks:
        print(f"WARNING: {remark}")
