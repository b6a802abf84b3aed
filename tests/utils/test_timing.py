"""Where the time of a step goes."""

import statistics
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.timing import covered, idle_share, interleaved_seconds


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted), max_size=8))
def test_intervals_cover_what_any_of_them_holds(intervals):
    points = {point for begin, end in intervals for point in range(begin, end)}
    assert covered(intervals) == len(points)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_a_device_is_idle_while_the_host_sleeps():
    matrix = torch.randn(512, 512, device="cuda")

    def half():
        matrix @ matrix
        torch.cuda.synchronize()
        time.sleep(0.02)

    seconds = statistics.median(interleaved_seconds({"half": half}, device=matrix.device, rounds=5)["half"])
    assert 0.9 < idle_share(half, device=matrix.device, seconds=seconds) < 1
    assert idle_share(half, device=torch.device("cpu"), seconds=seconds) is None
