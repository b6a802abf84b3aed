"""The choice of the filters that stay, by the weights of a network as they are at that moment."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from models.graph import ChannelGraph, Kept
from models.graph.cost import Widths
from models.graph.groups import ChannelGroup, single_groups
from models.graph.layers import PrunableLayer, SharedNorm
from models.graph.squares import squares_of_filters
from models.narrow import NarrowNetwork, Selection
from prune.allocation import Family, check_payable, counts_within, kept_channels, rank, uniform_counts
from prune.compact import compact_selection
from prune.criteria import CRITERIA
from prune.feature_maps import mean_of_maps
from prune.gradients import Loss, importances, mean_gradients
from prune.masks import Ratios, check_criterion, choose_filters, score_filters
from prune.removal import removal_order
from prune.settings import Budget
from utils.distributed import sum_over_processes
from utils.errors import ParameterError
from utils.images.batches import ImageData
from utils.seed import generator

NANOSECONDS = 1e9
WITHOUT_PASS = "filter-a"  # the criterion of a plan in the place of one that looks at training images


@dataclass(frozen=True)
class FilterChoice:
    """What chooses: `choice()` gives what stays of the network of `graph` by its weights as they are then.

    `ratios` holds the proportion that each of `layers` retains, `options` what the criterion may ask for (`gamma`,
    `gm_distance`). What a criterion asks for of gradients or feature maps is taken over the first `samp_batches` training
    batches of `data`, or over all. With `coupled` the filters of several layers that belong together go together
    (`models.graph.groups`). A `budget` says what the network that is left may cost, and decides on the layers whose ratio is
    None; `allocation` says how it is spent, and `seconds` gives the time of a network by its widths for a budget of time.
    `earlier` is what an earlier pruning has left: what it removed stays removed. If the choice is
    `nested`, or there is a budget, that counts among what this one removes, and what is left is scored by itself. Gradients are
    those of `loss(results, targets)`, None for the cross-entropy.
    """

    graph: ChannelGraph
    layers: Sequence[PrunableLayer]
    ratios: Ratios
    criterion: str
    data: ImageData
    seed: int
    samp_batches: int | None = None
    multiple: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    coupled: bool = False
    budget: Budget | None = None
    allocation: str = "uniform"
    earlier: Selection | None = None
    seconds: Callable[[Widths], float] | None = None
    nested: bool = False
    loss: Loss | None = None

    @property
    def network(self) -> nn.Module:
        return self.graph.network

    @property
    def takes_nothing(self) -> bool:
        """Whether every filter stays that is there, so that nothing has to be scored."""
        return all(ratio == 1 for ratio in self.ratios.values())

    @property
    def is_whole(self) -> bool:
        """Whether the network keeps, and has, all of its filters."""
        return self.takes_nothing and not self._was_pruned

    def check(self) -> None:
        """Raises UserError where the network lacks what the criterion reads, and for ratios or a budget that cannot be met.

        Whether a budget of time can be met is asked where `seconds` are known.
        """
        check_criterion(self.layers, self.ratios, criterion=self.criterion, multiple=self.multiple)
        if self.coupled or self.budget is not None:
            families = self._families({layer.name: torch.ones(layer.filters) for layer in self.layers})
            self._check_some_go(families)
            if self.budget is not None and (self.budget.kind != "latency" or self.seconds is not None):
                check_payable(self.budget, families, cost=partial(self._cost_of, families), dense=self._dense_cost)

    def _check_some_go(self, families: Sequence[Family]) -> None:
        """Raises UserError where filters are to go, and all of the families have to stay whole."""
        if self.coupled and not self.takes_nothing and all(family.is_fixed for family in families):
            raise ParameterError(
                "coupled",
                None,
                "no filter can go: each meets channels that an operation reads at full width, or that are excluded; leave it out",
            )
        if self.budget is not None and all(family.is_fixed for family in families):
            raise ParameterError("budget", self.budget, "no filter can go: all that could are excluded")

    def __call__(self) -> Selection:
        if self.takes_nothing:
            kept = {}
        elif self.coupled or self.budget is not None or self.nested:
            kept = self._highest_groups()
        else:
            kept = self._highest()
        for layer in self._layers_of_earlier:
            earlier = set(self.earlier.channels(layer.name))
            kept[layer.name] = [channel for channel in kept.get(layer.name, range(layer.filters)) if channel in earlier]
        return Selection(self.graph, kept)

    def _highest(self) -> dict[str, Sequence[int]]:
        kept = choose_filters(
            self.layers,
            self.ratios,
            criterion=self.criterion,
            **self._sampled(),
            multiple=self.multiple,
            generator=generator(self.seed, "filters"),
            **self.options,
        )
        return {name: channels.tolist() for name, channels in kept.items()}

    def _highest_groups(self) -> dict[str, Sequence[int]]:
        families = self._families(self._scores())
        if self.budget is None:
            counts = uniform_counts(families)
        else:
            cost = partial(self._cost_of, families)
            counts = counts_within(self.budget, families, cost=cost, allocation=self.allocation, dense=self._dense_cost)
        return self._kept(families, counts)

    def one_by_one(self, proportions: Sequence[float]) -> Iterator[tuple[list[str], int, list[Selection]]]:
        """Families of layers that lose the same channels, each alone: layers, filters, and what stays at each proportion."""
        families = self._families(self._scores())
        whole = [len(family.groups) for family in families]
        for place, family in enumerate(families):
            if family.is_fixed:
                continue
            counts = [[*whole[:place], family.count(proportion), *whole[place + 1 :]] for proportion in proportions]
            layers = list(family.groups[0].layers)
            filters = next(layer.filters for layer in self.layers if layer.name == layers[0])
            yield layers, filters, [Selection(self.graph, self._kept(families, each)) for each in counts]

    def _scores(self) -> dict[str, Tensor]:
        """Of the filters that are left, where that counts; a layer that lacks what the criterion reads has to keep all."""
        reads_norms = "bn_weight" in CRITERIA[self.criterion].inputs
        return score_filters(
            [layer for layer in self.layers if not reads_norms or layer.bn_weight is not None],
            criterion=self.criterion,
            left=self.earlier.kept if self._goes_on else None,
            **self._sampled(),
            generator=generator(self.seed, "filters"),
            **self.options,
        )

    def at_step(self, step: int, steps: int, selection: Selection | None) -> "FilterChoice":
        """The choice at one of `steps` equal steps, counted from 0, on the way to this one; `selection` is what the last left."""
        part = (step + 1) / steps
        return replace(
            self,
            ratios={name: None if ratio is None else 1 - (1 - ratio) * part for name, ratio in self.ratios.items()},
            budget=replace(self.budget, share=1 - (1 - self.budget.share) * part) if self.budget is not None else None,
            earlier=self.earlier if selection is None else selection,
            nested=selection is not None,
        )

    @property
    def _goes_on(self) -> bool:
        """Whether what an earlier pruning has removed counts among what this one removes."""
        return self.nested or (self._was_pruned and self.budget is not None)

    @property
    def _was_pruned(self) -> bool:
        return self.earlier is not None and not self.earlier.is_whole

    @cached_property
    def _left(self) -> dict[str, set[int]]:
        names = [layer.name for layer in self._layers_of_earlier] if self._goes_on else []
        return {name: set(self.earlier.channels(name)) for name in names}

    def _families(self, scores: Mapping[str, Tensor]) -> list[Family]:
        ratios = self.ratios
        if not self.coupled and self.budget is None:  # a depthwise convolution follows, whatever its own filters score
            leaders = {name for groups in self._groups for name in groups[0].layers[:1]}
            scores = {name: values for name, values in scores.items() if name in leaders}
            ratios = {**ratios, **{name: ratios[groups[0].layers[0]] for groups in self._groups for name in groups[0].layers}}
        families = rank(self._groups, scores, ratios=ratios, multiple=self.multiple)
        return [self._gone_first(family) for family in families] if self._goes_on else families

    def _gone_first(self, family: Family) -> Family:
        """The family with the groups in front that an earlier pruning has removed, which go first and do not come back.

        A group of which it has left some filters comes after them.
        """

        def filters_left(place: int) -> int:
            return sum(channel in self._left.get(name, (channel,)) for name, channel in family.groups[place].filters)

        order = sorted(range(len(family.groups)), key=filters_left)  # stable
        groups, scores = (tuple(values[place] for place in order) for values in (family.groups, family.scores))
        return replace(family, groups=groups, scores=scores, left=sum(filters_left(place) > 0 for place in order))

    def _cost_of(self, families: Sequence[Family], counts: Sequence[int]) -> dict[str, int]:
        return self.cost(self._kept(families, counts))

    @cached_property
    def _dense_cost(self) -> dict[str, int]:
        return self.cost({})

    def _kept(self, families: Sequence[Family], counts: Sequence[int]) -> dict[str, list[int]]:
        kept = kept_channels(families, counts, filters=self._filters)
        if not self._goes_on:
            return kept
        earlier = {name: sorted(self._left[name]) for name in self._left.keys() - kept.keys()}
        return {name: [each for each in kept[name] if each in self._left.get(name, (each,))] for name in kept} | earlier

    @cached_property
    def _filters(self) -> dict[str, int]:
        """Of the layers and of those norms of several layers whose channels go with them."""
        shared = {name for groups in self._groups for group in groups for name, _ in group.norms}
        norms = {norm.name: norm.filters for norm in self.graph.shared_norms(self.layers) if norm.name in shared}
        return {layer.name: layer.filters for layer in self.layers} | norms

    @cached_property
    def _groups(self) -> list[list[ChannelGroup]]:
        if not self.coupled:
            follows = self.budget is not None  # without one, a follower whose own proportion is 1 keeps everything
            return single_groups(
                [layer if follows or self.ratios[layer.name] != 1 else replace(layer, follows=None) for layer in self.layers]
            )
        return self.graph.channel_groups(self.layers)

    @cached_property
    def _layers_of_earlier(self) -> list[PrunableLayer | SharedNorm]:
        """What an earlier pruning has taken from, whether or not this one does; norms that go with one layer are left out."""
        if not self._was_pruned:
            return []
        layers = self.graph.prunable_layers(linear=True)
        return [layer for layer in (*layers, *self.graph.shared_norms(layers)) if layer.name in self.earlier.kept]

    def cost(self, kept: Kept) -> dict[str, int]:
        """`macs` of an image, `params` and, in nanoseconds, `latency` of the network with the channels `kept` of its layers."""
        norms = {layer.norm_name: kept[layer.name] for layer in self.layers if layer.norm_name and layer.name in kept}
        costs = self.graph.cost({**kept, **norms})
        if self.seconds is not None:
            costs["latency"] = round(NANOSECONDS * self.seconds(self.graph.widths({**kept, **norms})))
        return costs

    def outcome(self) -> tuple[NarrowNetwork, Widths]:
        """What this choice leaves of the network, and the widths of its layers."""
        return outcome_of(self())

    def _sampled(self) -> dict[str, dict[str, Tensor] | None]:
        """What the criterion asks for beyond a layer's own weights, most of which takes a pass over training images."""
        criterion = CRITERIA[self.criterion]
        passed = {"layers": self.layers, "all_reduce": sum_over_processes}
        gradients = importance = maps = order = None
        if criterion.needs_gradient:
            gradients = mean_gradients(self.network, self._batches(), loss=self.loss, **passed)
        if criterion.importance_of is not None:
            of = criterion.importance_of
            importance = importances(self.network, self._batches(), of=of, loss=self.loss, **passed)
        if criterion.needs_maps:
            maps = mean_of_maps(self.graph, self._batches(), of_maps=criterion.of_maps, **passed)
        if criterion.needs_order:
            order = removal_order(self.graph, self._groups, self._batches(), **passed)
        squares = squares_of_filters(self.graph, self._groups, self.layers) if criterion.needs_group else None
        sampled = {"gradients": gradients, "importance": importance, "feature_maps": maps}
        return {**sampled, "group_squares": squares, "removal_order": order}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch.images, batch.labels) for batch in islice(self.data.train_batches("scoring"), self.samp_batches))

    def without_pass(self) -> "FilterChoice":
        """A choice of as many filters that costs no pass over the data; the same one where the criterion needs none."""
        criterion = CRITERIA[self.criterion]
        return replace(self, criterion=WITHOUT_PASS) if criterion.looks_at_images else self


def outcome_of(selection: Selection) -> tuple[NarrowNetwork, Widths]:
    """What a selection leaves of its network, and the widths of its layers."""
    return small_network(selection), selection.widths


def small_network(selection: Selection) -> NarrowNetwork:
    """What a selection leaves of its network, which stays as it is, proved. Raises UserError where there is none."""
    return compact_selection(selection.mask(), selection)
