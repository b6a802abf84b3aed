"""Which test images a network classifies rightly, put together from all processes and written down."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import UserError
from utils.training.hits import TestHits, gather_hits, read_hits
from utils.world import World


def test_a_bit_an_image():
    assert TestHits(np.array([True] * 9 + [False]), "ab").document() == {"images": 10, "labels": "ab", "bits": "/4A="}


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_read_as_written(hits):
    found = read_hits(TestHits(np.array(hits), "ab").document())
    assert found.hits.tolist() == hits
    assert found.labels == "ab"


@pytest.mark.parametrize(
    "damage",
    [{"bits": "%%"}, {"bits": "AAAA"}, {"images": 10**12}, {"images": 0}, {"images": True}, {"labels": 3}],
)
def test_damaged_ones_are_refused(damage):
    with pytest.raises(UserError, match="its hits are damaged"):
        read_hits({**TestHits(np.array([True] * 9), "ab").document(), **damage})


def test_batches_follow_one_another_and_the_digest_is_of_the_labels():
    labels = [torch.tensor([1, 2]), torch.tensor([3])]
    found = gather_hits(labels, [torch.tensor([True, False]), torch.tensor([True])], World())
    assert found.hits.tolist() == [True, False, True]
    assert found.labels == gather_hits([torch.tensor([1, 2, 3])], [torch.ones(3, dtype=torch.bool)], World()).labels
    assert found.labels != gather_hits([torch.tensor([1, 2, 4])], [torch.ones(3, dtype=torch.bool)], World()).labels
