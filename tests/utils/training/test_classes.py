"""Accuracy by class and which classes are taken for one another."""

import pytest
import torch

from utils.training.classes import class_accuracies, class_document, class_lines, confusion_of

LABELS = [torch.tensor([0, 0, 0, 1]), torch.tensor([1, 2])]
PREDICTIONS = [torch.tensor([0, 1, 1, 1]), torch.tensor([1, 0])]


@pytest.fixture
def confusion() -> torch.Tensor:
    return confusion_of(LABELS, PREDICTIONS, num_classes=4)


def test_counts_by_class_and_prediction(confusion):
    assert confusion.tolist() == [[1, 2, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert class_accuracies(confusion) == [pytest.approx(100 / 3), 100.0, 0.0, None]


def test_names_the_worst_and_what_they_are_taken_for(confusion):
    assert class_lines(confusion, ["cat", "dog", "cow\n", "emu"]) == [
        "worst of 4 classes:",
        "  cow\\n: 0.00 of 1 images, 1 taken for cat",
        "  cat: 33.33 of 3 images, 2 taken for dog",
        "  dog: 100.00 of 2 images",
    ]
    many = torch.diag(torch.arange(1, 9))
    assert len(class_lines(many, list("abcdefgh"))) == 6


def test_leaves_out_the_matrix_of_many_classes(confusion):
    assert class_document(confusion, list("abcd"))["confusion"] == confusion.tolist()
    assert class_document(torch.eye(101).long(), ["x"] * 101).keys() == {"names", "images", "top1"}
