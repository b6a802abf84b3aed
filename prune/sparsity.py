"""Training that makes channels small before they are pruned: a penalty beside the loss.

- "bn": Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, eq. 1: `s * sum |g|` over
  the scales g of all batch norms.
- "group": Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, eq. 7: `s / 2 * sum_k 2^(4 (I_max - I_k) /
  (I_max - I_min)) * I_k` over the groups k, I_k the squares of all weights that go with one (`models.graph.squares`), I_max and
  I_min among the groups of the same layers. The exponents are taken anew at the beginning of each epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.graph import ChannelGraph
from models.graph.roles import BATCH_NORMS
from models.graph.squares import GroupSquares
from prune.settings import BN_SPARSITY, Sparsity
from utils.errors import ParameterError
from utils.training.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Callable

GROWTH = 4.0  # the exponent of the smallest group, the paper's alpha


class BatchNormPenalty(nn.Module):
    """`penalty(network)` is the sum of the absolute scales of its batch norms."""

    def __init__(self, graph: ChannelGraph):
        super().__init__()
        named = graph.network.named_modules()
        self.names = [name for name, module in named if isinstance(module, BATCH_NORMS) and module.affine]
        if not self.names:
            raise ParameterError("sparsity", BN_SPARSITY, "the network has no batch norm with scales, choose group")

    def begin_epoch(self, network: nn.Module) -> None:
        """Nothing changes from epoch to epoch."""

    def forward(self, network: nn.Module) -> Tensor:
        return torch.stack([network.get_submodule(name).weight.abs().sum() for name in self.names]).sum()


class GroupPenalty(nn.Module):
    """`penalty(network)` is half the sum of the squares of its groups, the smaller ones weighted up to 16 times."""

    def __init__(self, graph: ChannelGraph):
        super().__init__()
        layers = graph.prunable_layers()
        families = graph.channel_groups(layers)
        if not families:
            raise ParameterError("sparsity", "group", "no channels of the network can go together")
        self.squares = GroupSquares(graph, families, layers)
        self.register_buffer("weights", torch.ones(self.squares.count))

    @torch.no_grad()
    def begin_epoch(self, network: nn.Module) -> None:
        values, family = self.squares(network), self.squares.family
        least, most = (_by_family(values, family, reduce) for reduce in ("amin", "amax"))
        span = (most - least)[family]
        distance = torch.where(span > 0, (most[family] - values) / span.clamp(min=torch.finfo(values.dtype).tiny), 0)
        self.weights.copy_(2 ** (GROWTH * distance))

    def forward(self, network: nn.Module) -> Tensor:
        return (self.weights * self.squares(network)).sum() / 2


def _by_family(values: Tensor, family: Tensor, reduce: str) -> Tensor:
    found = values.new_zeros(int(family.max()) + 1)
    return found.scatter_reduce(0, family, values, reduce, include_self=False)


PENALTIES: dict[str, Callable[[ChannelGraph], nn.Module]] = {BN_SPARSITY: BatchNormPenalty, "group": GroupPenalty}


class SparseObjective(Objective):
    """Another objective, and beside it `strength` times a penalty on the channels of the network that it trains.

    The exponents of a group penalty are part of its state, so that a run resumes within an epoch. Raises ParameterError for
    a network that has nothing to make sparse.
    """

    def __init__(self, objective: Objective, network: nn.Module, sparsity: Sparsity, *, example: Tensor):
        super().__init__()
        self.objective, self.sparsity = objective, sparsity
        device = next(network.parameters()).device
        self.penalty = PENALTIES[sparsity.kind](ChannelGraph(network, example)).to(device)
        self._network = [network]  # which the objective has among its own parts already

    def formula(self) -> str:
        return f"{self.objective.formula()} + {self.sparsity.strength:g} {self.sparsity.kind} sparsity"

    def begin_step(self, epoch: int, step: int, *, steps: int) -> None:
        self.objective.begin_step(epoch, step, steps=steps)
        if step == 0:
            self.penalty.begin_epoch(self._network[0])

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, logits, terms = self.objective(images, labels, indices)
        penalty = self.penalty(self._network[0])
        terms = {**(terms or {"ce": loss.detach()}), "sparsity": penalty.detach()}
        return loss + self.sparsity.strength * penalty, logits, terms
