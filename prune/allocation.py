"""How many channels each layer keeps: a proportion of each, or what a budget of the whole network's cost pays for.

`uniform`: every layer the same proportion, as the papers on filter criteria do. `global`: the groups of all layers are ranked
together by the sum of their filters' scores per unit of cost, each layer's scores divided by their mean so that layers can be
compared.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from models.graph.groups import ChannelGroup
from prune.masks import keep_count
from prune.settings import Budget
from utils.errors import ParameterError

FLOOR = 0.1  # of its groups that every family keeps under a budget
RATIO_STEPS = 1000
_FLOOR_STEP = round(FLOOR * RATIO_STEPS)
CLOSE = 0.02  # of the dense cost: so near a budget is met


@dataclass(frozen=True)
class Family:
    """The groups of the same convolutions, the lowest score first.

    `scores` are comparable between families. The number that stays is a multiple of `step`, or all. `keep_ratio` None is what a
    budget pays for; under a budget all stay where `is_fixed`, and never more than the last `left`: the others are gone already.
    """

    groups: tuple[ChannelGroup, ...]
    scores: tuple[float, ...]
    step: int = 1
    keep_ratio: float | None = 1.0
    left: int | None = None

    @property
    def is_fixed(self) -> bool:
        return self.keep_ratio == 1

    def count(self, keep_ratio: float) -> int:
        return keep_count(len(self.groups), keep_ratio, multiple=self.step)

    @property
    def most(self) -> int:
        return len(self.groups) if self.left is None else self.left

    @property
    def floor(self) -> int:
        """The fewest that stay under a budget: a tenth, up to the next step."""
        return min(self.most, self.step * max(1, math.ceil(FLOOR * len(self.groups) / self.step)))


def rank(
    families: Sequence[Sequence[ChannelGroup]], scores: Mapping[str, Tensor], *, ratios: Mapping[str, float | None], multiple: int
) -> list[Family]:
    """Families of groups by their scores: the mean over a group of its filters' `scores` (F,), each layer's divided by its mean.

    A filter whose score is NaN counts in no mean, nor does a layer without scores. Of equal scores the lower index comes first.
    Raises UserError where layers that go together have different `ratios`; one
    that keeps all of its filters keeps those of the others.
    """
    normalised = {name: _over_mean(values.double()).tolist() for name, values in scores.items()}
    return [_ranked(groups, normalised, ratios=ratios, multiple=multiple) for groups in families]


def _over_mean(scores: Tensor) -> Tensor:
    mean = scores.nanmean()
    return (scores / mean if mean > 0 else scores).nan_to_num(0)


def _ranked(
    groups: Sequence[ChannelGroup], scores: Mapping[str, list[float]], *, ratios: Mapping[str, float | None], multiple: int
) -> Family:
    def score(group: ChannelGroup) -> float:
        scored = [scores[name][channel] for name, channel in group.filters if name in scores]
        return sum(scored) / len(scored) if scored else 0.0

    layers = groups[0].layers
    own = {ratios[name] for name in layers}
    if len(own) > 1 and 1 not in own:
        raise ParameterError(
            "keep_ratios",
            None,
            f"{layers[0]} and {layers[-1]} lose the same channels, as they are coupled: give them one value",
        )
    ordered = sorted(groups, key=score)  # stable
    filters = sum(name == layers[0] for name, _ in groups[0].filters)
    step = multiple // math.gcd(multiple, filters)
    return Family(tuple(ordered), tuple(map(score, ordered)), step, 1.0 if 1 in own else own.pop())


Counts = tuple[int, ...]


def uniform_counts(families: Sequence[Family]) -> Counts:
    """How many groups of each family its keep ratio leaves."""
    return tuple(family.count(family.keep_ratio) for family in families)


def counts_within(
    budget: Budget,
    families: Sequence[Family],
    *,
    cost: Callable[[Counts], Mapping[str, int]],
    allocation: str,
    dense: Mapping[str, int] | None = None,
) -> Counts:
    """How many groups of each family stay so that the network costs no more than the budget, and hardly less.

    `cost(counts)` gives the cost of the network by kind, `dense` that of the dense one where families have lost groups before.
    At least a tenth of each family stays. Raises UserError for a budget that does not pay for that.
    """
    whole = _whole(families)
    dense_cost = (dense or cost(whole))[budget.kind]
    limit = budget.share * dense_cost

    def fits(counts: Counts) -> bool:
        return cost(counts)[budget.kind] <= limit

    check_payable(budget, families, cost=cost, dense=dense)
    if fits(whole):  # what is left is cheap enough as it is
        return whole
    ladder = _LADDERS[allocation](families, lambda counts: cost(counts)[budget.kind])
    highest = bisect.bisect_left(ladder, True, key=lambda counts: not fits(counts)) - 1
    if allocation == "uniform":
        most = [min(family.most, count + family.step) for family, count in zip(families, ladder[highest], strict=True)]
        return _topped_up(families, ladder[highest], fits, most=most)
    counts = _topped_up(families, ladder[highest], fits, most=whole)
    other = _exchanged(ladder, highest, fits) if cost(counts)[budget.kind] < limit - CLOSE * dense_cost else None
    if other is None:
        return counts
    return max(counts, _topped_up(families, other, fits, most=whole), key=lambda counts: cost(counts)[budget.kind])


def check_payable(
    budget: Budget,
    families: Sequence[Family],
    *,
    cost: Callable[[Counts], Mapping[str, int]],
    dense: Mapping[str, int] | None = None,
) -> None:
    """Raises UserError for a budget that does not pay for the tenth of each family that stays."""
    whole = (dense or cost(_whole(families)))[budget.kind]
    least = cost(_fewest(families))[budget.kind]
    if least > budget.share * whole:
        share = math.ceil(1000 * least / whole) / 1000
        raise ParameterError(
            "budget", budget, f"a tenth of each layer stays, and all that is excluded: {budget.kind}={share:g} is the least"
        )


def _whole(families: Sequence[Family]) -> Counts:
    return tuple(family.most for family in families)


def _fewest(families: Sequence[Family]) -> Counts:
    return tuple(family.most if family.is_fixed else family.floor for family in families)


class _UniformLadder(Sequence[Counts]):
    """The counts at every proportion, from the floor to the whole network, each worked out when it is asked for."""

    def __init__(self, families: Sequence[Family], cost: Callable[[Counts], int]):
        self._families = families

    def __len__(self) -> int:
        return RATIO_STEPS - _FLOOR_STEP + 1

    def __getitem__(self, rung: int) -> Counts:
        keep_ratio = (_FLOOR_STEP + range(len(self))[rung]) / RATIO_STEPS
        return tuple(
            family.most if family.is_fixed else min(family.most, max(family.floor, family.count(keep_ratio)))
            for family in self._families
        )


def _global_ladder(families: Sequence[Family], cost: Callable[[Counts], int]) -> list[Counts]:
    """The counts when the groups of all families come back one after the other, the most valuable for its cost first.

    A group is worth the sum of its filters' scores, as it costs what all of them do: what its whole family does above its floor,
    by their number, for where times rise in steps a single group may seem to be free.
    """
    whole, counts = _whole(families), list(_fewest(families))
    prices = []
    for place, floor in enumerate(counts):
        least = tuple(floor if other == place else count for other, count in enumerate(whole))
        prices.append(max((cost(whole) - cost(least)) / max(whole[place] - floor, 1), 1))
    order = sorted(
        (-family.scores[rank] * len(family.groups[rank].filters) / price, place, -rank)
        for place, (family, price) in enumerate(zip(families, prices, strict=True))
        for rank in range(len(family.groups) - family.most, len(family.groups) - counts[place])
    )
    ladder, come_back = [tuple(counts)], list(counts)
    for _, place, _ in order:
        come_back[place] += 1
        family = families[place]
        if come_back[place] % family.step == 0 or come_back[place] == family.most:
            counts[place] = come_back[place]
            ladder.append(tuple(counts))
    return ladder


_LADDERS = {"uniform": _UniformLadder, "global": _global_ladder}


def _exchanged(ladder: Sequence[Counts], highest: int, fits: Callable[[Counts], bool]) -> Counts | None:
    """The counts one rung above what fits, less the groups that came back last of other families, as many as it takes."""
    if highest + 1 == len(ladder):
        return None

    def place_at(rung: int) -> int:
        return next(place for place, count in enumerate(ladder[rung]) if count != ladder[rung - 1][place])

    counts, dear = list(ladder[highest + 1]), place_at(highest + 1)
    for rung in range(highest, 0, -1):
        place = place_at(rung)
        if place != dear:
            counts[place] = ladder[rung - 1][place]
            if fits(tuple(counts)):
                return tuple(counts)
    return None


def _topped_up(families: Sequence[Family], counts: Counts, fits: Callable[[Counts], bool], *, most: Sequence[int]) -> Counts:
    """What is left of a budget goes, step by step, to the families where it is enough, up to `most` of each."""
    open_places = [place for place, count in enumerate(counts) if count < most[place]]
    while open_places:
        still_open = []
        for place in open_places:
            count = min(most[place], counts[place] + families[place].step)
            more = (*counts[:place], count, *counts[place + 1 :])
            if fits(more):
                counts = more
                still_open += [place] if count < most[place] else []
        open_places = still_open
    return counts


def kept_channels(families: Sequence[Family], counts: Counts, *, filters: Mapping[str, int]) -> dict[str, list[int]]:
    """The channels that stay, by layer: of all layers in `filters` (name to number of outputs), ascending."""
    gone: dict[str, set[int]] = {}
    for family, count in zip(families, counts, strict=True):
        for group in family.groups[: len(family.groups) - count]:
            for name, channel in (*group.filters, *group.norms):
                gone.setdefault(name, set()).add(channel)
    return {name: sorted({*range(full)} - gone.get(name, set())) for name, full in filters.items()}
