"""How right a network is over the test images of all processes."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError
from utils.images.batches import ImageData
from utils.training.hits import TestHits, gather_hits
from utils.training.metrics import Sums
from utils.training.step import autocast


@torch.no_grad()
def evaluate(network: nn.Module, data: ImageData, *, amp: bool = False) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy in percent over the test images of all processes; the network's mode is kept."""
    return _evaluate(network, data, amp=amp)[0].read()


@torch.no_grad()
def evaluate_each(network: nn.Module, data: ImageData, *, amp: bool = False) -> tuple[dict[str, float], TestHits]:
    """As `evaluate`, and which of the test images are classified rightly, over all processes."""
    sums, labels, hits = _evaluate(network, data, amp=amp)
    return sums.read(), gather_hits(labels, hits, data.world)


def _evaluate(network: nn.Module, data: ImageData, *, amp: bool) -> tuple[Sums, list[Tensor], list[Tensor]]:
    """What this process's part of the test images adds up to, and batch by batch their labels and whether each is a hit."""
    was_training = network.training
    network.eval()
    sums, all_labels, hits = Sums(data.device), [], []
    for images, labels, *_ in data.test_batches():
        with autocast(data.device, amp):
            logits = network(images)
        hits.append(sums.add({"loss": F.cross_entropy(logits.float(), labels)}, logits, labels))
        all_labels.append(labels)
    network.train(was_training)
    return sums, all_labels, hits


def check_score(result: Mapping[str, float], *, origin: str) -> None:
    """Raises UserError for the result of `evaluate` of a network that gave NaN or infinite logits."""
    if not math.isfinite(result["loss"]):
        raise UserError(f"{origin}: gives logits that are NaN or infinite for some of the test images, it has no accuracy")


def print_score(model: str, data: ImageData, result: dict[str, float]) -> None:
    """The accuracy of a network, after what a user should know of the images that it was given; see `check_score`."""
    check_score(result, origin=f"{model} on {data.dataset.name}")
    if data.world.is_main:
        print_remarks(data)
        print(
            f"{model} on {data.dataset.name}: loss {result['loss']:.4f}, top1 {result['top1']:.2f}, top5 {result['top5']:.2f} "
            f"over {result['images']} images"
        )


def print_remarks(data: ImageData) -> None:
    for remark in data.remarks:
        print(f"WARNING: {remark}")
