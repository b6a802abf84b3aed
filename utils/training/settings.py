"""The recipe of a training and everything that decides about a run, without anything that has to be imported for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.images.settings import DataSettings
from utils.runs.settings import RunSettings

SHIPPED = ("average", "trained")


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained: SGD, its learning rate (`utils.training.learning_rate`), the average of its weights, and
    the batches over which batch norm's statistics are estimated before an evaluation."""

    lr: float
    n_epochs: int
    lr_schedule: str = "steps"
    schedule: Sequence[int] = ()
    lr_drops: Sequence[float] = ()
    warmup_epochs: int = 0
    momentum: float = 0.9
    no_nesterov: bool = False
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    ema: float | None = None
    ships: str = "average"
    recalibrate_bn: int | None = None


@dataclass(frozen=True)
class SessionSettings:
    """All that a run is made of. `flags` is what its config.json records, `defaults` what each is where nobody gives it,
    `given` what its config.toml says, the flags that somebody gave."""

    script: str
    data: DataSettings
    training: TrainingSettings
    run: RunSettings
    flags: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
