"""Random streams that can be repeated, saved and kept apart."""

import random

import numpy as np
import torch

from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.seed import derived_seed, generator, preserved_random_state, random_state, restore_random_state, seed_everything


def draw() -> list[float]:
    """Some numbers of every global stream, an odd number of normal ones included, which leave one over."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(3).tolist()]


def test_a_seed_repeats_every_stream():
    seed_everything(8152)
    first = draw()
    seed_everything(8152)
    assert draw() == first
    seed_everything(1011)
    assert all(left != right for left, right in zip(draw(), first, strict=True))


def test_the_largest_seed_is_one():
    seed_everything(2**63 - 1)
    assert len(draw()) == 7


def test_state_survives_a_file(tmp_path):
    seed_everything(3)
    draw()
    save_checkpoint(tmp_path / "state.pt", {"random": random_state()})
    expected = [draw() for _ in range(3)]
    seed_everything(4)
    restore_random_state(load_checkpoint(tmp_path / "state.pt")["random"])
    assert [draw() for _ in range(3)] == expected


def test_what_is_drawn_inside_leaves_no_trace():
    seed_everything(5)
    with preserved_random_state():
        inside = draw()
        torch.manual_seed(99)
    assert draw() == inside


def test_purposes_have_streams_of_their_own():
    purposes = [("order", epoch) for epoch in range(50)] + [("augmentation", epoch) for epoch in range(50)] + [("order", "x")]
    seeds = {derived_seed(seed, *purpose) for seed in (0, 1, 8152) for purpose in purposes}
    assert len(seeds) == 3 * len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_purpose_is_no_matter_of_where_words_end():
    assert derived_seed(1, "a", 1) != derived_seed(1, "a1")
    assert derived_seed(11, "a") != derived_seed(1, "1a")


def test_a_generator_draws_from_no_global_stream():
    seed_everything(6)
    before = draw()
    seed_everything(6)
    first = torch.rand(4, generator=generator(6, "filters"))
    assert draw() == before
    assert torch.equal(first, torch.rand(4, generator=generator(6, "filters")))
