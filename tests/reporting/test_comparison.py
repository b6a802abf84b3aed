"""Paired differences: by hand, by another formula, and by the rates at which planted ones are found."""

import json
from functools import partial

import numpy as np
import pytest
from saved_runs import write_pruned
from scipy import stats

from reporting.comparison import Scores, compare, image_variances, interval_of_seeds, residual_variance
from reporting.comparison_table import comparison_tables
from reporting.gather import gather
from utils.errors import UserError
from utils.training.hits import TestHits


def without_hits(*rows):
    """Methods a, b, ... with these accuracies in the seeds 0, 1, ..."""
    return {chr(ord("a") + index): Scores(dict(enumerate(row)), {}) for index, row in enumerate(rows)}


def test_two_methods_are_a_paired_t_test():
    ours, theirs = [81.0, 82.5, 80.9, 83.0], [80.0, 82.0, 80.5, 81.5]
    found = compare(without_hits(theirs, ours), "a").differences["b"]
    expected = stats.ttest_rel(ours, theirs)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean, found.p) == pytest.approx((0.85, expected.pvalue))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_more_methods_share_their_residual_and_each_interval_grows():
    table = np.array([[80.0, 82.0], [81.0, 82.0], [80.5, 82.5]])
    # residuals by hand: rows 81, 81.5, 81.5, columns 80.5, 82.1666..., all 81.3333...
    assert residual_variance(table) == (pytest.approx(0.25 / 3 + 0.25 / 3), 2)
    found = compare(without_hits(*table), "a").differences["b"]
    reach = stats.t.ppf(1 - 0.025 / 2, 2) * (2 * (0.5 / 3) / 2) ** 0.5
    assert (found.mean, found.high - found.mean) == pytest.approx((0.5, reach))


def test_a_method_that_falls_apart_in_some_seeds_does_not_spoil_the_others():
    steady = [[80.0, 81.0, 80.5], [80.4, 81.6, 80.8], [80.3, 81.1, 81.1]]
    alone, spoilt = (compare(without_hits(*steady, *more), "a") for more in ([], [[10.0, 75.0, 79.0]]))
    assert (alone.unlike, spoilt.unlike) == ((), ("d",))
    for name in ("b", "c"):  # one comparison more, and nothing else
        factor = stats.t.ppf(1 - 0.025 / 3, 4) / stats.t.ppf(1 - 0.025 / 2, 4)
        reaches = [found.differences[name].high - found.differences[name].mean for found in (alone, spoilt)]
        assert reaches[1] == pytest.approx(factor * reaches[0])
    wild = [-70.0, -6.0, -1.5]
    own = stats.ttest_rel(wild, [0.0, 0.0, 0.0]).confidence_interval(1 - 0.05 / 3)
    assert (spoilt.differences["d"].low, spoilt.differences["d"].high) == pytest.approx(tuple(own))


def test_the_draw_of_images_by_analysis_of_variance():
    # two seeds, four images; differences in points 100, 0, 0, 100 and 100, 0, -100, 0
    ours, theirs = np.array([[1, 1, 0, 1], [1, 1, 0, 0]], bool), np.array([[0, 1, 0, 0], [0, 1, 1, 0]], bool)
    # means of images 100, 0, -50, 50 around 25: a mean square of 2 * (75^2 + 25^2 + 75^2 + 25^2) / 3
    differences = 100.0 * (ours.astype(float) - theirs)
    by_image = 2 * ((differences.mean(0) - 25) ** 2).sum() / 3
    remaining = differences - differences.mean(0) - differences.mean(1, keepdims=True) + 25
    assert by_image == pytest.approx(12500 * 2 / 3)
    rest = (remaining**2).sum() / 3
    assert image_variances(list(ours), list(theirs)) == (pytest.approx((by_image - rest) / 8), pytest.approx(rest / 8))
    assert image_variances(list(ours), list(ours)) == (0, 0)


def test_what_cannot_be_compared():
    assert compare(without_hits([80.0], [81.0]), "a") is None  # one seed has no error
    assert compare(without_hits([80.0, 81.0]), "a") is None
    methods = without_hits([80.0, 81.0], [81.0, 82.5]) | {"short": Scores({0: 82.0}, {})}
    assert compare(methods, "a").differences.keys() == {"b"}


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_seeds_that_came_out_alike_tell_nothing(gain):
    found = compare(without_hits([80.0, 81.0], [80.0 + gain, 81.0 + gain]), "a").differences["b"]
    assert (found.mean, found.p, found.is_told_apart) == (gain, 1.0, False)


def test_seeds_that_came_out_alike_differ_by_the_luck_with_images_at_least():
    def missing(*images):
        hits = {seed: TestHits(np.arange(360) != image, "labels") for seed, image in enumerate(images)}
        return Scores({seed: 100 * each.hits.mean() for seed, each in hits.items()}, hits)

    whole = Scores(dict.fromkeys((0, 1), 100.0), missing(-1, -1).hits)
    found = compare({"a": whole, "b": missing(3, 8)}, "a").differences["b"]
    assert found.mean == pytest.approx(-100 / 360) and found.low < found.mean < 0 < found.high


def test_hits_of_other_test_sets_are_no_pairs():
    def scores(labels):
        hits = {seed: TestHits(np.arange(8) % (seed + 2) == 0, labels) for seed in (0, 1)}
        return Scores({seed: 100 * each.hits.mean() for seed, each in hits.items()}, hits)

    found = compare({"a": scores("x"), "b": scores("x"), "c": scores("y"), "d": Scores({0: 10.0, 1: 20.0}, {})}, "a")
    assert found.without_images == ("c", "d")


def test_an_interval_over_seeds():
    low, high = interval_of_seeds([80.0, 81.0, 82.0])
    assert (low, high) == pytest.approx((81 - 4.30265 / 3**0.5, 81 + 4.30265 / 3**0.5), abs=1e-4)
    assert interval_of_seeds([80.0]) is None


def simulated(stream, gains, *, seeds, images=2000, deviation=0.2):
    """Methods whose true accuracies are 80 % and so many points more, in seeds that draw their networks and one draw of images.

    An image is hit where its ease and the luck of a network exceed a threshold; networks of one seed share half of their luck.
    """
    ease = stream.normal(size=images) * 3
    scale = np.hypot(3, 1)
    slope = 100 * stats.norm.pdf(stats.norm.ppf(0.8)) / scale  # points of accuracy a unit
    methods = {name: ({}, {}) for name in gains}
    for seed in range(seeds):
        shared = stream.normal(size=images) * 0.5**0.5
        for name, gain in gains.items():
            shift = (gain + stream.normal() * deviation) / slope
            luck = shared + stream.normal(size=images) * 0.5**0.5
            hits = stats.norm.ppf(0.8) * scale + shift + ease + luck > 0
            methods[name][0][seed], methods[name][1][seed] = 100 * hits.mean(), TestHits(hits, "labels")
    return {name: Scores(*parts) for name, parts in methods.items()}


def test_a_planted_half_point_is_found_and_none_is_not():
    """Of 100 studies of 16 seeds: 0.5 points are found in 95 or more, and in 95 or so nothing is found where nothing is."""
    stream = np.random.default_rng(1)
    found, wrong, covered = 0, 0, 0
    for _ in range(100):
        methods = simulated(stream, {"baseline": 0, "better": 0.5, "same": 0, "alike": 0}, seeds=16, images=10_000, deviation=0.1)
        differences = compare(methods, "baseline").differences
        found += differences["better"].low > 0
        wrong += differences["same"].is_told_apart or differences["alike"].is_told_apart
        covered += differences["better"].low <= 0.5 <= differences["better"].high
    assert found >= 95
    assert wrong <= 11  # of 5 expected at most: a count that Poisson's law exceeds once in 100 times
    assert covered >= 95


@pytest.mark.parametrize("seeds", [2, 3])
def test_few_seeds_find_less_but_nothing_that_is_not_there(seeds):
    stream = np.random.default_rng(seeds)
    make = partial(simulated, stream, {"a": 0, "b": 0, "c": 0, "d": 0, "e": 0}, seeds=seeds)
    wrong = sum(any(each.is_told_apart for each in compare(make(), "a").differences.values()) for _ in range(100))
    assert wrong <= 11


@pytest.fixture
def saves(tmp_path):
    for seed in (1, 2, 3):
        for name, top1, mode in (("a", 90.0 + seed % 2, "filter-a"), ("gm", 98.0 + seed % 2 + seed / 10, "filter-gm")):
            folder = write_pruned(tmp_path / f"{name}-{seed}", top1=top1, prune_mode=mode, distill=["none"], seed=seed)
            document = {"epoch": 3, **TestHits(np.arange(100) < top1, "labels").document()}
            (folder / "hits.json").write_text(json.dumps(document))
    write_pruned(tmp_path / "nggm-1", top1=92.0, distill=["none"], seed=1)
    return tmp_path


def test_a_table_says_who_is_better_and_who_is_left_out(saves):
    (table,) = comparison_tables(gather([saves]).groups, "PFEC, 0.6 | F*, 0.6 | NGGM*")
    assert table.title == "ResNet-20 on digits, beside PFEC, 0.6"
    assert [(row[0], row[table.headings.index("verdict")]) for row in table.rows] == [
        ("FPGM, 0.6", "better"),
        ("PFEC, 0.6", "baseline"),
    ]
    assert "+8.20 [" in table.markdown()
    assert "Not compared, for want of a seed: NGGM, 0.6." in table.caption
    assert "the seed and the draw of test images" in table.caption


def test_accuracies_are_over_the_seeds_of_the_comparison(saves):
    write_pruned(saves / "gm-4", top1=10.0, prune_mode="filter-gm", distill=["none"], seed=4)
    (table,) = comparison_tables(gather([saves]).groups, "PFEC, 0.6 | FPGM, 0.6")
    best = table.rows[0]
    assert (best[0], best[1]) == ("FPGM, 0.6", "3") and best[2].startswith("98.87 [")


def test_names_in_a_caption_are_no_markup(saves):
    write_pruned(saves / "hostile", top1=92.0, prune_mode="<img src=x>", distill=["none"], seed=1)
    (table,) = comparison_tables(gather([saves]).groups, "PFEC, 0.6 | *")
    assert "<img" in table.caption and "<img" not in table.markdown()


@pytest.mark.parametrize("text", ["PFEC", "PFEC, 0.6", "PFEC, 0.6 | NGGM, 0.6", "NGGM, 0.6 | PFEC, 0.6"])
def test_a_comparison_without_a_pair_names_what_there_is(saves, text):
    with pytest.raises(UserError, match=r"no such method with two seeds and another beside it; there are FPGM, .*; NGGM, "):
        comparison_tables(gather([saves]).groups, text)
