"""Sums over images against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import NonFiniteLoss
from utils.training.metrics import Sums, label_rank

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("logits", "label", "rank"),
    [
        ([3.0, 1.0, 2.0], 0, 0),
        ([3.0, 1.0, 2.0], 2, 1),
        ([3.0, 1.0, 2.0], 1, 2),
        ([2.0, 2.0, 2.0], 0, 0),  # of equal logits the lower class comes first
        ([2.0, 2.0, 2.0], 2, 2),
        ([float("nan"), 1.0, 2.0], 2, 1),  # NaN comes before all
        ([float("nan"), 1.0, 2.0], 0, 3),  # and never is the right answer
        ([float("nan")] * 3, 1, 3),
        ([float("inf"), 1.0, 2.0], 0, 0),
        ([-float("inf"), 1.0, 2.0], 0, 2),
    ],
)
def test_label_rank_by_hand(logits, label, rank):
    assert int(label_rank(torch.tensor([logits]), torch.tensor([label]))) == rank


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(2, 9))
def test_label_rank_is_the_place_in_a_stable_sort(seed, images, classes):
    random = np.random.default_rng(seed)
    logits = random.integers(0, 4, (images, classes)).astype(np.float32)  # so that many are equal
    labels = random.integers(0, classes, images)
    order = np.argsort(-logits, axis=1, kind="stable")
    expected = np.argmax(order == labels[:, None], axis=1)
    assert label_rank(torch.from_numpy(logits), torch.from_numpy(labels)).tolist() == expected.tolist()


def test_means_are_over_images_not_batches():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(20, 7)), random.integers(0, 7, 20)
    losses = random.uniform(0, 5, 20)
    sums = Sums(CPU)
    for part in (slice(0, 16), slice(16, 20)):  # a last batch a quarter as large
        loss = torch.tensor(losses[part].mean(), dtype=torch.float32)
        sums.add({"loss": loss, "kd": 2 * loss}, torch.from_numpy(logits[part]), torch.from_numpy(labels[part]))
    values = sums.read()
    ranks = (logits > logits[np.arange(20), labels][:, None]).sum(1)
    assert values["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert values["kd"] == pytest.approx(2 * losses.mean(), rel=1e-6)
    assert values["top1"] == pytest.approx(100 * (ranks < 1).mean())
    assert values["top5"] == pytest.approx(100 * (ranks < 5).mean())
    assert values["images"] == 20


def test_fewer_than_five_classes_are_all_in_the_top_five():
    sums = Sums(CPU)
    sums.add({"loss": torch.tensor(1.0)}, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0]))
    assert (sums.read()["top1"], sums.read()["top5"]) == (50.0, 100.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_step_is_named(bad):
    sums = Sums(CPU)
    for step, loss in enumerate([1.0, 2.0, bad, 1.0, bad]):
        sums.add({"loss": torch.tensor(loss)}, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), step=step)
    with pytest.raises(NonFiniteLoss, match="epoch 8, step 3;"):
        sums.check_finite(epoch=7)


def test_finite_losses_pass():
    sums = Sums(CPU)
    sums.add({"loss": torch.tensor(1e30)}, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    sums.check_finite(epoch=0)


def test_a_saved_sum_goes_on_where_it_was():
    random = np.random.default_rng(1)
    batches = [(torch.from_numpy(random.normal(size=(4, 6))), torch.from_numpy(random.integers(0, 6, 4))) for _ in range(4)]
    whole, first = Sums(CPU), Sums(CPU)
    for index, (logits, labels) in enumerate(batches):
        whole.add({"loss": logits.mean()}, logits, labels, step=index)
        if index < 2:
            first.add({"loss": logits.mean()}, logits, labels, step=index)
    second = Sums(CPU)
    second.load_state_dict(first.state_dict())
    for logits, labels in batches[2:]:
        second.add({"loss": logits.mean()}, logits, labels)
    assert second.read() == whole.read()
