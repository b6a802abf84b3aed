"""The choice of the filters that stay, by the weights of a network as they are at that moment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from prune.criteria import CRITERIA
from prune.gradients import mean_gradients
from prune.masks import PrunableLayer, check_criterion, choose_filters
from utils.data import ImageData
from utils.distributed import sum_over_processes
from utils.seed import generator

WITHOUT_GRADIENT = "filter-a"  # the criterion of a plan in the place of one that needs a gradient


@dataclass(frozen=True)
class FilterChoice:
    """What chooses: `choice()` gives the filters of `network` that stay, by layer, sorted int64 indices on the CPU.

    `ratios` holds the proportion that each of `layers` retains, `options` what the criterion may ask for (`gamma`,
    `gm_distance`). A criterion that needs gradients takes them over the first `samp_batches` training batches of `data`, or
    over all. `earlier` holds the channels that an earlier pruning has left, by layer: what it removed stays removed.
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
    earlier: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def takes_nothing(self) -> bool:
        """Whether every filter stays that is there, so that nothing has to be scored."""
        return all(ratio == 1 for ratio in self.ratios.values())

    @property
    def is_whole(self) -> bool:
        """Whether the network keeps, and has, all of its filters."""
        return self.takes_nothing and not self.earlier

    def check(self) -> None:
        """Raises UserError where the network lacks what the criterion reads of it."""
        check_criterion(self.layers, self.ratios, criterion=self.criterion, multiple=self.multiple)

    def __call__(self) -> dict[str, Tensor]:
        kept = {layer.name: torch.arange(layer.filters) for layer in self.layers} if self.takes_nothing else self._highest()
        earlier = {name: torch.tensor(channels) for name, channels in self.earlier.items()}
        return {name: channels[torch.isin(channels, earlier.get(name, channels))] for name, channels in kept.items()}

    def _highest(self) -> dict[str, Tensor]:
        return choose_filters(
            self.layers,
            self.ratios,
            criterion=self.criterion,
            gradients=self._gradients() if CRITERIA[self.criterion].needs_gradient else None,
            multiple=self.multiple,
            generator=generator(self.seed, "filters"),
            **self.options,
        )

    def _gradients(self) -> dict[str, Tensor]:
        batches = ((batch.images, batch.labels) for batch in islice(self.data.train_batches("scoring"), self.samp_batches))
        return mean_gradients(
            self.network,
            batches,
            layers=self.layers,
            training=CRITERIA[self.criterion].gradient_mode == "training",
            all_reduce=sum_over_processes,
        )

    def without_gradient(self) -> "FilterChoice":
        """A choice of as many filters that costs no pass over the data; the same one where the criterion needs none."""
        return replace(self, criterion=WITHOUT_GRADIENT) if CRITERIA[self.criterion].needs_gradient else self
