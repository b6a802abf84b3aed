"""The learning rate of every step: the product of steps, straight lines and cosines, and the warm-up before them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.training.learning_rate import LR_SCHEDULES, LearningRate


def rates(rate: LearningRate, *, steps: int) -> list[float]:
    return [rate.at(epoch, step, steps=steps) for epoch in range(rate.n_epochs) for step in range(steps)]


class TestSteps:
    @pytest.mark.parametrize(
        ("epoch", "expected"),
        [(0, 0.01), (1, 0.1), (59, 0.1), (60, 0.02), (119, 0.02), (120, 0.004), (160, 0.0008), (199, 0.0008)],
    )
    def test_of_the_usual_teacher(self, epoch, expected):
        rate = LearningRate(0.01, n_epochs=200, schedule=(1, 60, 120, 160), lr_drops=(10, 0.2, 0.2, 0.2))
        assert rate.at(epoch) == rate.at(epoch, 7, steps=8) == pytest.approx(expected)

    def test_can_change_before_the_first_epoch(self):
        assert LearningRate(0.1, n_epochs=3, schedule=(0,), lr_drops=(0.5,)).at(0) == 0.05

    def test_without_a_schedule_stays(self):
        assert LearningRate(0.1, n_epochs=1000).at(500) == 0.1

    @given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.01, 10)), max_size=5), st.integers(0, 60))
    def test_is_the_product_of_the_factors_that_have_come(self, changes, epoch):
        schedule, drops = [change[0] for change in changes], [change[1] for change in changes]
        expected = 0.3 * math.prod(factor for milestone, factor in changes if milestone <= epoch)
        assert LearningRate(0.3, n_epochs=61, schedule=schedule, lr_drops=drops).at(epoch) == pytest.approx(expected)


def test_linear_worked_by_hand():
    assert rates(LearningRate(1.0, n_epochs=2, kind="linear"), steps=2) == [1.0, 0.75, 0.5, 0.25]


def test_cosine_worked_by_hand():
    half = math.sqrt(0.5)
    expected = [1.0, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert rates(LearningRate(1.0, n_epochs=2, kind="cosine"), steps=2) == pytest.approx(expected)


def test_a_warm_up_rises_from_its_first_step_to_the_full_rate_and_the_fall_begins_behind_it():
    rate = LearningRate(0.4, n_epochs=3, kind="linear", warmup_epochs=1)
    assert rates(rate, steps=2) == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2, 0.1])


def test_a_warm_up_before_steps_ends_at_their_rate():
    rate = LearningRate(1.0, n_epochs=4, schedule=(1, 3), lr_drops=(10, 0.1), warmup_epochs=2)
    assert rates(rate, steps=2) == pytest.approx([0.25, 0.5, 7.5, 10, 10, 10, 1, 1])


@given(st.sampled_from(LR_SCHEDULES), st.integers(1, 6), st.integers(1, 5), st.data())
def test_every_step_has_a_positive_rate_up_to_the_named_one(kind, n_epochs, steps, data):
    rate = LearningRate(0.2, n_epochs=n_epochs, kind=kind, warmup_epochs=data.draw(st.integers(0, n_epochs - 1)))
    found = rates(rate, steps=steps)
    assert all(0 < value <= 0.2 for value in found)
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_the_plan_of_a_billion_epochs_names_its_changes():
    rate = LearningRate(0.1, n_epochs=10**9, schedule=(0, 60, 10**10), lr_drops=(0.5, 0.2, 0.2))
    assert rate.describe() == "0.05 from epoch 1, 0.01 from epoch 61"
    rising = LearningRate(0.1, n_epochs=10**9, kind="cosine", warmup_epochs=5)
    assert rising.describe() == "rising over 5 epochs to 0.1, then falling to 0 over the 1000000000 epochs (cosine)"


@pytest.mark.parametrize(
    ("n_epochs", "rises", "schedule", "drops"),
    [
        (200, True, [1, 60, 120, 160], [10, 0.2, 0.2, 0.2]),
        (300, True, [1, 60, 120, 160], [10, 0.2, 0.2, 0.2]),
        (200, False, [60, 120, 160], [0.2, 0.2, 0.2]),
        (100, True, [1, 30, 60, 80], [10, 0.2, 0.2, 0.2]),
        (10, True, [3, 6, 8], [0.2, 0.2, 0.2]),
        (3, True, [1, 2], [0.2, 0.2 * 0.2]),
        (1, True, [], []),
        (0, False, [], []),
    ],
)
def test_a_schedule_fits_the_epochs_and_no_short_training_rises(n_epochs, rises, schedule, drops):
    usual = LearningRate(0.01, 200, schedule=(1, 60, 120, 160), lr_drops=(10, 0.2, 0.2, 0.2))
    assert usual.fitted(n_epochs, rises=rises) == (schedule, pytest.approx(drops))
