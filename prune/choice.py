"""The choice of the filters that stay, by the weights of a network as they are at that moment."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from models.narrow import NarrowNetwork
from prune.allocation import Family, check_payable, counts_within, kept_channels, rank, uniform_counts
from prune.compact import compact
from prune.cost import NetworkCost, Widths
from prune.criteria import CRITERIA
from prune.feature_maps import mean_of_maps
from prune.gradients import importances, mean_gradients
from prune.groups import ChannelGroup, channel_groups, single_groups
from prune.masks import PrunableLayer, SharedNorm, check_criterion, choose_filters, prunable_layers, score_filters, shared_norms
from prune.schedule import HardPruning
from prune.settings import Budget
from utils.distributed import sum_over_processes
from utils.errors import UserError
from utils.images.batches import ImageData
from utils.seed import generator

WITHOUT_PASS = "filter-a"  # the criterion of a plan in the place of one that looks at training images


@dataclass(frozen=True)
class FilterChoice:
    """What chooses: `choice()` gives the filters of `network` that stay, by layer, sorted int64 indices on the CPU.

    `ratios` holds the proportion that each of `layers` retains, `options` what the criterion may ask for (`gamma`,
    `gm_distance`). What a criterion asks for of gradients or feature maps is taken over the first `samp_batches` training
    batches of `data`, or over all. With `coupled` the filters of several layers that belong together go together
    (`prune.groups`). A `budget` says what the network that is left may cost, and takes the place of the ratios below 1;
    `allocation` says how it is spent, and `seconds` what a budget of time has to know (`prune.cost`).
    `earlier` holds the channels that an earlier pruning has left, by layer: what it removed stays removed. If the choice is
    `nested`, or there is a budget, that counts among what this one removes, and what is left is scored by itself.
    """

    network: nn.Module
    layers: Sequence[PrunableLayer]
    ratios: Mapping[str, float]
    criterion: str
    data: ImageData
    seed: int
    samp_batches: int | None = None
    multiple: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    coupled: bool = False
    budget: Budget | None = None
    allocation: str = "uniform"
    earlier: Mapping[str, Sequence[int]] = field(default_factory=dict)
    seconds: Callable[[Widths], float] | None = None
    nested: bool = False

    @property
    def takes_nothing(self) -> bool:
        """Whether every filter stays that is there, so that nothing has to be scored."""
        return all(ratio == 1 for ratio in self.ratios.values())

    @property
    def is_whole(self) -> bool:
        """Whether the network keeps, and has, all of its filters."""
        return self.takes_nothing and not self.earlier

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
            raise UserError(
                "--couple-channels: no filter can go: each meets channels that an operation reads at full width, or that "
                "--exclude-layers keeps; leave it out"
            )
        if self.budget is not None and all(family.is_fixed for family in families):
            raise UserError(f"--budget {self.budget}: no filter can go: --exclude-layers keeps all that could")

    def __call__(self) -> dict[str, Tensor]:
        if self.takes_nothing:
            kept = {layer.name: torch.arange(layer.filters) for layer in self.layers}
        elif self.coupled or self.budget is not None or self.nested:
            kept = self._highest_groups()
        else:
            kept = self._highest()
        kept |= {layer.name: torch.arange(layer.filters) for layer in self._layers_of_earlier if layer.name not in kept}
        earlier = {name: torch.tensor(channels) for name, channels in self.earlier.items()}
        return {name: channels[torch.isin(channels, earlier.get(name, channels))] for name, channels in kept.items()}

    def _highest(self) -> dict[str, Tensor]:
        return choose_filters(
            self.layers,
            self.ratios,
            criterion=self.criterion,
            **self._sampled(),
            multiple=self.multiple,
            generator=generator(self.seed, "filters"),
            **self.options,
        )

    def _highest_groups(self) -> dict[str, Tensor]:
        families = self._families(self._scores())
        if self.budget is None:
            counts = uniform_counts(families)
        else:
            cost = partial(self._cost_of, families)
            counts = counts_within(self.budget, families, cost=cost, allocation=self.allocation, dense=self._dense_cost)
        return {name: torch.tensor(channels) for name, channels in self._kept(families, counts).items()}

    def one_by_one(self, proportions: Sequence[float]) -> Iterator[tuple[list[str], int, list[dict[str, Tensor]]]]:
        """Families of layers that lose the same channels, each alone: layers, filters, and what is kept at each proportion."""
        families = self._families(self._scores())
        whole = [len(family.groups) for family in families]
        for place, family in enumerate(families):
            if family.is_fixed:
                continue
            counts = [[*whole[:place], family.count(proportion), *whole[place + 1 :]] for proportion in proportions]
            kept = [self._kept(families, each) for each in counts]
            layers = list(family.groups[0].layers)
            filters = next(layer.filters for layer in self.layers if layer.name == layers[0])
            yield layers, filters, [{name: torch.tensor(channels) for name, channels in each.items()} for each in kept]

    def _scores(self) -> dict[str, Tensor]:
        """Of the filters that are left, where that counts; a layer that lacks what the criterion reads has to keep all."""
        reads_norms = "bn_weight" in CRITERIA[self.criterion].inputs
        return score_filters(
            [layer for layer in self.layers if not reads_norms or layer.bn_weight is not None],
            criterion=self.criterion,
            left=self.earlier if self._goes_on else None,
            **self._sampled(),
            generator=generator(self.seed, "filters"),
            **self.options,
        )

    def at_step(self, step: int, steps: int, kept: Mapping[str, Tensor] | None) -> "FilterChoice":
        """The choice at one of `steps` equal steps, counted from 0, on the way to this one; `kept` is what the last one left."""
        part = (step + 1) / steps
        return replace(
            self,
            ratios={name: 1 - (1 - ratio) * part for name, ratio in self.ratios.items()},
            budget=replace(self.budget, share=1 - (1 - self.budget.share) * part) if self.budget is not None else None,
            earlier={**self.earlier, **{name: channels.tolist() for name, channels in (kept or {}).items()}},
            nested=kept is not None,
        )

    @property
    def _goes_on(self) -> bool:
        """Whether what an earlier pruning has removed counts among what this one removes."""
        return bool(self.earlier) and (self.nested or self.budget is not None)

    @cached_property
    def _left(self) -> dict[str, set[int]]:
        names = [layer.name for layer in self._layers_of_earlier] if self._goes_on else []
        return {name: set(self.earlier[name]) for name in names}

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
        everything = (*self.layers, *shared_norms(self.network, self.layers))
        return self.cost({layer.name: range(layer.filters) for layer in everything})

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
        norms = {norm.name: norm.filters for norm in shared_norms(self.network, self.layers) if norm.name in shared}
        return {layer.name: layer.filters for layer in self.layers} | norms

    @cached_property
    def _groups(self) -> list[list[ChannelGroup]]:
        if not self.coupled:
            follows = self.budget is not None  # without one, a follower whose own proportion is 1 keeps everything
            return single_groups(
                [layer if follows or self.ratios[layer.name] < 1 else replace(layer, follows=None) for layer in self.layers]
            )
        return channel_groups(self.network, self.layers, example=self.data.example)

    @cached_property
    def _cost(self) -> NetworkCost:
        return NetworkCost(self.network, self.data.example[:1], seconds=self.seconds)

    @cached_property
    def _layers_of_earlier(self) -> list[PrunableLayer | SharedNorm]:
        """What an earlier pruning has taken from, whether or not this one does; norms that go with one layer are left out."""
        if not self.earlier:
            return []
        layers = prunable_layers(self.network, linear=True, example=self.data.example)
        return [layer for layer in (*layers, *shared_norms(self.network, layers)) if layer.name in self.earlier]

    def cost(self, kept: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """MACs of an image and parameters of the network with the channels `kept`."""
        return self._cost(self._with_norms(kept))

    def share_of_macs(self, kept: Mapping[str, Tensor]) -> float:
        """What is left of the dense network's multiply-accumulates with the channels `kept`."""
        return self.cost({name: channels.tolist() for name, channels in kept.items()})["macs"] / self._dense_cost["macs"]

    def widths(self, kept: Mapping[str, Tensor]) -> Widths:
        """The channels that each layer reads and gives in the network with the channels `kept`."""
        return self._cost.widths(
            self._with_norms({name: [int(channel) for channel in channels] for name, channels in kept.items()})
        )

    def outcome(self, kept: Mapping[str, Tensor] | None = None) -> tuple[NarrowNetwork, Widths]:
        """What is left of the network with the channels `kept`, or else by this choice, and the widths of its layers."""
        kept = self() if kept is None else kept
        return self.small_network(kept), self.widths(kept)

    def small_network(self, kept: Mapping[str, Tensor]) -> NarrowNetwork:
        """What is left of the network with the channels `kept`; that stays as it is. Raises UserError where there is none."""
        pruned = copy.deepcopy(self.network)
        HardPruning(pruned, kept)
        return compact(pruned, self.data.example)

    def _with_norms(self, kept: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
        return {**kept, **{layer.norm_name: kept[layer.name] for layer in self.layers if layer.norm_name is not None}}

    def _sampled(self) -> dict[str, dict[str, Tensor] | None]:
        """What the criterion asks for that takes a pass over training images."""
        criterion = CRITERIA[self.criterion]
        passed = {"layers": self.layers, "all_reduce": sum_over_processes}
        gradients = importance = maps = None
        if criterion.needs_gradient:
            gradients = mean_gradients(self.network, self._batches(), **passed)
        if criterion.importance_of is not None:
            importance = importances(self.network, self._batches(), of=criterion.importance_of, **passed)
        if criterion.needs_maps:
            example = self.data.example
            maps = mean_of_maps(self.network, self._batches(), of_maps=criterion.of_maps, example=example, **passed)
        return {"gradients": gradients, "importance": importance, "feature_maps": maps}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch.images, batch.labels) for batch in islice(self.data.train_batches("scoring"), self.samp_batches))

    def without_pass(self) -> "FilterChoice":
        """A choice of as many filters that costs no pass over the data; the same one where the criterion needs none."""
        criterion = CRITERIA[self.criterion]
        return replace(self, criterion=WITHOUT_PASS) if criterion.looks_at_images else self
