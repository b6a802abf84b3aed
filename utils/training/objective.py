"""What is trained.

An objective is called as `objective(images, labels, indices) -> (loss, logits, terms)`, `indices` being the rows of the images
in the training set: the 0-dim loss to minimise, and detached the (b, classes) logits and each named 0-dim term of the loss.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Objective(nn.Module):
    """Called as the module's docstring says."""

    def formula(self) -> str:
        """The loss as the plan of a run shows it."""
        raise NotImplementedError

    def begin_step(self, epoch: int, step: int, *, steps: int) -> None:
        """Called before every `step`, counted from 0, of the `steps` of an epoch."""

    def exchange(self, network: nn.Module) -> None:
        """Trains `network`, which gives outputs of the same shapes, in place of the one so far."""
        raise NotImplementedError


class CrossEntropyObjective(Objective):
    """Plain training: the cross-entropy of `network`, its targets softened by `label_smoothing` (a share from 0 to below 1)."""

    def __init__(self, network: nn.Module, *, label_smoothing: float = 0.0):
        super().__init__()
        self.network = network
        self.label_smoothing = label_smoothing

    def formula(self) -> str:
        return cross_entropy_formula(self.label_smoothing)

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits = logits_of(self.network(images))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return loss, logits.detach(), {}

    def exchange(self, network: nn.Module) -> None:
        self.network = network


def logits_of(result: Any) -> Tensor:
    """The logits among what a network gives: in training some give more beside them, those of auxiliary heads."""
    return result[0] if isinstance(result, tuple | list) and result else result


def cross_entropy_formula(label_smoothing: float) -> str:
    """How a formula names the cross-entropy."""
    return f"CE (labels smoothed by {label_smoothing:g})" if label_smoothing else "CE"
