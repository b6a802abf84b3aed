"""What a student is taught by, without anything that has to be imported for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DistillationSettings:
    """The names of the losses, ["none"] or some of `distill.registry`; `alpha` weighs KD, `betas` the losses that have a beta.

    `ce_weight` weighs the cross-entropy beside them. Weights that rise do so over `rise_epochs`, None: over a share of the run.
    `betas` None stands for each loss's own; `options` holds those of every loss by keyword, and may hold more than are read.
    """

    losses: Sequence[str] = ("none",)
    alpha: float = 0.0
    betas: Sequence[float] | None = None
    options: Mapping[str, bool | int | float] = field(default_factory=dict)
    ce_weight: float = 1.0
    rise_epochs: float | None = None
