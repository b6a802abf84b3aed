"""Rounding the rows of a weight to whole levels: dependent quantization in which later columns make good what earlier ones leave.

Two grids take turns, the even multiples of a step and, beside zero, the odd ones. A small machine, driven by the parities
of the levels so far, says which one holds, so that a row is a path through a trellis (Fischer and Wang, "Entropy-constrained
trellis-coded quantization", IEEE Trans. Inf. Theory 1992; the machine is that of ISO/IEC 15938-17). What the rounding of a
column leaves is corrected in the columns behind it, by the factors of the Gram matrix of the layer's inputs (Frantar et al.,
"OPTQ", ICLR 2023; geometrically, Babai's nearest plane). The Viterbi algorithm does both together: every survivor carries
the errors of its own path, and its cost is the error of the layer's outputs plus a multiplier times the bits that its levels
would take under a Laplace distribution.
"""

from dataclasses import dataclass

import numpy as np

WINDOW = 48  # columns in which survivors may differ; they meet within five or six times log2 of the number of states
COMMITTED = 16  # columns that are settled at a time
LEAST_MAGNITUDE = 1e-3  # of the mean of a row, in steps: bounds the price of a level in a row of zeros

# the next state after an even and after an odd level; the lowest bit of a state says which grid holds
MACHINE = np.array([[0, 2], [7, 5], [1, 3], [6, 4], [2, 0], [5, 7], [3, 1], [4, 6]])
STATES = len(MACHINE)


def quantize_rows(values: np.ndarray, factors: "Factors", *, multiplier: np.ndarray) -> np.ndarray:
    """Levels (F, J), int32, for the weights `values` (F, J), which are in steps.

    `factors` are of the Gram matrix of what the columns read, each multiplied by its column's step. `multiplier` (F,) is what
    a bit may cost in each row.
    """
    search = _Search(values, factors, multiplier=multiplier)
    for column in range(values.shape[1]):
        search.step(column)
        if column - search.settled + 1 == WINDOW:
            search.settle(COMMITTED)
    search.settle(values.shape[1] - search.settled)
    return levels_of(np.rint(values - search.errors))


def levels_of(multiples: np.ndarray) -> np.ndarray:
    """The level of each multiple of a step, int32: half of it, away from zero. Even and odd multiples never share a grid."""
    return (np.sign(multiples) * ((np.abs(multiples) + 1) // 2)).astype(np.int32)


def multiples_of(levels: np.ndarray) -> np.ndarray:
    """The inverse of `levels_of` for whole rows of levels (F, J): multiples of the step, int32."""
    return 2 * levels - np.sign(levels) * _grids_of(levels)


def _grids_of(levels: np.ndarray) -> np.ndarray:
    """Which grid each level (F, J) of the rows belongs to: 0 for even multiples, 1 for odd ones."""
    parities = levels & 1
    state = np.zeros(len(levels), np.int64)
    grids = np.empty(levels.shape, levels.dtype)
    for column in range(levels.shape[1]):
        grids[:, column] = state & 1
        state = MACHINE[state, parities[:, column]]
    return grids


@dataclass(frozen=True)
class Factors:
    """A positive definite Gram matrix (G, J, J), one a group of rows, taken apart.

    The cost `e gram e'` of errors `e` (J,) is the sum over j of `pivots[j] (e[j] + e[:j] correction[:j, j])^2`: what is left of
    column j's cost once all columns behind it have made good what they can.
    """

    correction: np.ndarray  # (G, J, J), above the diagonal
    pivots: np.ndarray  # (G, J)

    @classmethod
    def of(cls, gram: np.ndarray) -> "Factors":
        upper = np.linalg.cholesky(gram[:, ::-1, ::-1])[:, ::-1, ::-1]
        diagonal = np.diagonal(upper, axis1=1, axis2=2)
        return cls(upper / diagonal[:, None], np.square(diagonal))

    def in_steps(self, steps: np.ndarray) -> "Factors":
        """Of the same matrix for errors in `steps` (J,) of their columns."""
        return Factors(self.correction * (steps[:, None] / steps), self.pivots * np.square(steps))


@dataclass(frozen=True)
class _Prices:
    """Bits of a level: `zero` (F, S), and otherwise `first` (F, S) and `more` (F, 1) for each level beyond 1."""

    zero: np.ndarray
    first: np.ndarray
    more: np.ndarray


def _laplace_prices(values: np.ndarray, grids: np.ndarray) -> _Prices:
    """The prices under a Laplace distribution with the mean magnitude of each row, for states with the given grids (S,)."""
    magnitude = np.maximum(np.abs(values).mean(1, keepdims=True), LEAST_MAGNITUDE)
    inside = np.where(grids == 0, 1.0, 0.5)  # half the width of the interval around zero
    zero = -np.expm1(-inside / magnitude)
    more = 2 / (magnitude * np.log(2))
    first = inside / (magnitude * np.log(2)) + 1 - np.log2(-np.expm1(-2 / magnitude))  # with the bit of the sign
    return _Prices(-np.log2(zero), first, more)


class _Search:
    """The Viterbi algorithm over all rows at once. F rows in G groups, S states, W columns since the last that are settled."""

    def __init__(self, values: np.ndarray, factors: Factors, *, multiplier: np.ndarray):
        rows = len(values)
        self.groups = len(factors.pivots)
        self.pivots = _as_float(factors.pivots.repeat(rows // self.groups, 0))  # (F, J)
        self.correction = _as_float(factors.correction)
        self.values = _as_float(values)
        self.targets = self.values.copy()  # with what settled errors ask for
        self.errors = np.zeros_like(self.targets)
        self.settled = 0
        grids = np.arange(STATES) & 1
        self.offsets = _as_float(np.where(grids == 0, [[0.0], [2.0]], [[-1.0], [1.0]]).T)  # (S, 2): of even, odd levels
        prices = _laplace_prices(values, grids)
        price = multiplier.reshape(-1, 1)
        self.zero, self.first, self.more = (
            _as_float(price * part)[..., None] for part in (prices.zero, prices.first, prices.more)
        )
        self.odd = np.array([0.0, 1.0], np.float32)
        pairs = [np.argwhere(state == MACHINE) for state in range(STATES)]  # of state and parity, two that lead to each state
        self.sources = np.array([[2 * state + parity for state, parity in pair] for pair in pairs])  # (S, 2)
        self.costs = np.full((rows, STATES), np.inf, np.float32)
        self.costs[:, 0] = 0
        self.history = np.zeros((rows, STATES, WINDOW), np.float32)
        self.rows = np.arange(rows)[:, None]

    def step(self, column: int) -> None:
        """Takes every survivor one column further."""
        depth = column - self.settled
        target = self.targets[:, column : column + 1] + self._asked(column, depth)  # (F, S)
        magnitude = np.abs(target)[..., None]
        near = np.maximum(np.rint((magnitude - self.offsets) * np.float32(0.25)), 0)  # (F, S, 2)
        pivot = self.pivots[:, column, None, None]
        cost, left = self._cost(magnitude, near, pivot)
        lower_cost, lower_left = self._cost(magnitude, np.maximum(near - 1, 0), pivot)
        is_lower = lower_cost < cost
        cost = (np.where(is_lower, lower_cost, cost) + self.costs[..., None]).reshape(len(cost), -1)
        left = np.where(is_lower, lower_left, left).reshape(len(left), -1)
        first, second = cost[:, self.sources[:, 0]], cost[:, self.sources[:, 1]]
        chosen = np.where(second < first, self.sources[:, 1], self.sources[:, 0])  # (F, S)
        self.costs = np.minimum(first, second)
        before = chosen >> 1
        target = target[self.rows, before]
        left = np.copysign(1, target) * left[self.rows, chosen]
        self.history = self.history[self.rows, before]
        self.history[..., depth] = left - target + self.values[:, column : column + 1]  # the value less its level's multiple

    def _asked(self, column: int, depth: int) -> np.ndarray:
        """What the errors of each survivor ask of a column, (F, S)."""
        errors = self.history[..., :depth].reshape(self.groups, len(self.rows) // self.groups * STATES, depth)
        return (errors @ self.correction[:, self.settled : column, column, None]).reshape(-1, STATES)

    def _cost(self, magnitude: np.ndarray, pairs: np.ndarray, pivot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cost and remainder (F, S, 2) of the levels `2 pairs + parity`."""
        left = magnitude - np.maximum(4 * pairs + self.offsets, 0)
        level = 2 * pairs + self.odd
        return pivot * left * left + np.where(level > 0, self.first + self.more * (level - 1), self.zero), left

    def settle(self, count: int) -> None:
        """Takes the oldest `count` columns from the best survivor of each row; survivors that differ from it there end."""
        best = self.costs.argmin(1)
        errors = self.history[self.rows[:, 0], best, :count]
        columns, rest = slice(self.settled, self.settled + count), slice(self.settled + count, None)
        self.errors[:, columns] = errors
        self.costs[(self.history[..., :count] != errors[:, None]).any(-1)] = np.inf
        self.costs -= self.costs.min(1, keepdims=True)
        self.history[..., : WINDOW - count] = self.history[..., count:].copy()
        self.settled += count
        asked = errors.reshape(self.groups, len(self.rows) // self.groups, count) @ self.correction[:, columns, rest]
        self.targets[:, rest] += asked.reshape(len(errors), -1)


def _as_float(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)
