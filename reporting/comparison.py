"""Which methods differ from a named one: paired differences of accuracy with intervals that hold for all of them at once.

Methods are compared over the seeds that they share: each seed has its teacher, its order of images, and the same test images.
A difference has two sources of error. What the seed does is estimated from the table of methods by seeds, as the residual of
its rows and columns, over all methods together, for with three seeds no single pair could say it; a method that differs from seed
to seed far more than the others is left out of that and judged by itself. What the draw of the test images does is estimated
from the pair, image by image, as in the analysis of several readers of the same cases (Dorfman, Berbaum and Metz, Investigative
Radiology 1992; degrees of freedom after Hillis, Statistics in Medicine 2007). Intervals and p-values are Bonferroni's for the
number of comparisons.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from utils.training.hits import TestHits

LEVEL = 0.95
FAR_MORE = 10.0  # times the median variance: of three seeds and methods, reached by chance in two tables of a hundred


class Scores(NamedTuple):
    """Of one method by seed: top-1 accuracy in percent, and which test images are hit, where that is known."""

    accuracies: Mapping[int, float]
    hits: Mapping[int, TestHits]


class Difference(NamedTuple):
    """Of a method's mean accuracy from the baseline's, in points: an interval that is wide enough for all, and adjusted p."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


class Comparison(NamedTuple):
    """Differences from the baseline by method, and the `seeds` they rest on.

    `without_images` are the methods in whose errors the draw of test images has no part, for which of them they or the baseline
    hit is not known; `unlike` those whose error is their own, for they differ far more from seed to seed.
    """

    baseline: str
    seeds: tuple[int, ...]
    differences: dict[str, Difference]
    without_images: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()


def compare(methods: Mapping[str, Scores], baseline: str) -> Comparison | None:
    """Every method beside `baseline`, one of them, over the baseline's seeds; methods that lack one are left out.

    None where there is nothing to compare, or only one seed, from which no error can be estimated.
    """
    seeds = tuple(sorted(methods[baseline].accuracies))
    complete = {name: scores for name, scores in methods.items() if set(seeds) <= scores.accuracies.keys()}
    if len(seeds) < 2 or len(complete) < 2:
        return None
    own = methods[baseline]
    others = {name: scores for name, scores in complete.items() if name != baseline}
    paired = {name: np.array([each.accuracies[seed] - own.accuracies[seed] for seed in seeds]) for name, each in others.items()}
    unlike = _unlike({name: float(values.var(ddof=1)) for name, values in paired.items()})
    alike = [scores for name, scores in complete.items() if name not in unlike]
    table = np.array([[scores.accuracies[seed] for seed in seeds] for scores in alike])  # (methods, seeds)
    of_seeds, freedom = residual_variance(table) if len(alike) > 1 else (0.0, 0)
    with_images = [name for name, scores in others.items() if _are_comparable(scores.hits, own.hits, seeds)]
    differences = {}
    for name, scores in others.items():
        draw = luck = 0.0
        if name in with_images:
            draw, luck = image_variances(*([each.hits[seed].hits for seed in seeds] for each in (scores, own)))
        error = (paired[name].var(ddof=1), len(seeds) - 1) if name in unlike else (2 * of_seeds, freedom)
        seed_part = max(float(error[0]) / len(seeds), luck)
        mean = float(paired[name].mean())
        differences[name] = _difference(mean, seed_part=seed_part, image_part=draw, freedom=error[1], count=len(others))
    return Comparison(baseline, seeds, differences, tuple(name for name in others if name not in with_images), tuple(unlike))


def _unlike(variances: Mapping[str, float]) -> list[str]:
    """The methods of which a pair's differences vary far more than those of the others."""
    usual = float(np.median(list(variances.values())))
    return [name for name, variance in variances.items() if len(variances) > 2 and variance > FAR_MORE * usual > 0]


def residual_variance(table: np.ndarray) -> tuple[float, int]:
    """Of (methods, seeds) accuracies: the variance that neither a method nor a seed explains, and its degrees of freedom."""
    residual = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    return float((residual**2).sum() / freedom), freedom


def image_variances(hits: Sequence[np.ndarray], baseline_hits: Sequence[np.ndarray]) -> tuple[float, float]:
    """What images add to the variance of the mean difference over S seeds, in squared points: their draw, and luck with them.

    Of (S, N) differences image by image, the draw of the N test images is the mean square of images less that of what remains,
    over S N, 0 or more. What remains, over S N, is what seeds differ by at least, however alike a few of them came out.
    """
    differences = 100.0 * (np.array(hits, dtype=float) - np.array(baseline_hits, dtype=float))
    seeds, images = differences.shape
    by_image, by_seed = differences.mean(0), differences.mean(1)
    of_images = seeds * ((by_image - differences.mean()) ** 2).sum() / (images - 1)
    remaining = differences - by_image - by_seed[:, None] + differences.mean()
    of_remaining = (remaining**2).sum() / ((images - 1) * (seeds - 1))
    return float(max(of_images - of_remaining, 0) / (seeds * images)), float(of_remaining / (seeds * images))


def _are_comparable(hits: Mapping[int, TestHits], others: Mapping[int, TestHits], seeds: Sequence[int]) -> bool:
    """Whether both know the hits of the same test images, more than one, in every seed."""
    found = [each.get(seed) for each in (hits, others) for seed in seeds]
    return None not in found and len({(len(each.hits), each.labels) for each in found}) == 1 and len(found[0].hits) > 1


def _difference(mean: float, *, seed_part: float, image_part: float, freedom: int, count: int) -> Difference:
    variance = seed_part + image_part
    if not seed_part:  # seeds came out alike to the last digit: nothing says by how much they would differ
        return Difference(mean, -np.inf, np.inf, 1.0)
    freedom *= (variance / seed_part) ** 2
    error = variance**0.5
    reach = stats.t.ppf(1 - (1 - LEVEL) / (2 * count), freedom) * error
    p = min(1.0, count * 2 * stats.t.sf(abs(mean) / error, freedom))
    return Difference(mean, mean - reach, mean + reach, float(p))


def interval_of_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over seeds by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    reach = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - reach), float(np.mean(values) + reach)
