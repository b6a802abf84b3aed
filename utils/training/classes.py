"""How right a network is class by class, and which classes it takes for one another."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from utils.distributed import sum_over_processes
from utils.errors import printable

WORST_SHOWN = 5
MOST_CLASSES_OF_A_MATRIX = 100  # of more of them a summary has no matrix, which would be nearly all zeros and megabytes
NAME_CHARACTERS = 30


def confusion_of(labels: Sequence[Tensor], predictions: Sequence[Tensor], *, num_classes: int) -> Tensor:
    """(C, C) int64 on the CPU: how many images of each class, a row, were given each class; over all processes."""
    if labels:
        cells = torch.cat([own * num_classes + given for own, given in zip(labels, predictions, strict=True)])
    else:
        cells = torch.empty(0, dtype=torch.int64)
    counts = torch.bincount(cells, minlength=num_classes**2)
    sum_over_processes(counts)
    return counts.view(num_classes, num_classes).cpu()


def class_accuracies(confusion: Tensor) -> list[float | None]:
    """Accuracy in percent of each class, None for one without a test image."""
    hits, images = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    return [100 * hit / count if count else None for hit, count in zip(hits, images, strict=True)]


def class_lines(confusion: Tensor, names: Sequence[str]) -> list[str]:
    """The classes with the lowest accuracy, worst first, each with what its images are most often taken for."""
    accuracies = class_accuracies(confusion)
    known = sorted((accuracy, row) for row, accuracy in enumerate(accuracies) if accuracy is not None)
    lines = [f"worst of {len(names)} classes:"]
    for accuracy, row in known[:WORST_SHOWN]:
        others = confusion[row].clone()
        others[row] = 0
        wrong, images = int(others.max()), int(confusion[row].sum())
        taken = f", {wrong} taken for {printable(names[int(others.argmax())], NAME_CHARACTERS)}" if wrong else ""
        lines.append(f"  {printable(names[row], NAME_CHARACTERS)}: {accuracy:.2f} of {images} images{taken}")
    return lines


def class_document(confusion: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """What a summary says of the classes, as JSON holds it."""
    document = {"names": list(names), "images": confusion.sum(1).tolist(), "top1": class_accuracies(confusion)}
    return {**document, "confusion": confusion.tolist()} if len(names) <= MOST_CLASSES_OF_A_MATRIX else document
