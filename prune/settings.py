"""What is pruned, by what and how far, without anything that has to be imported for it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError, shown

COSTS = ("macs", "params", "latency")
ALLOCATIONS = ("uniform", "global")
TRAIN_FORMS = ("auto", "compact", "masked")
SOFT_CRITERIA = ("filter-a", "filter-l2", "filter-gm")
SENSITIVITY_SUFFIX = ".json"
BN_SPARSITY = "bn"
SPARSITIES = {BN_SPARSITY: 1e-4, "group": 5e-4}  # with the strengths of their official codes


@dataclass(frozen=True)
class Budget:
    """`share` is what the small network may cost of the dense one's `kind`."""

    kind: str
    share: float

    def __str__(self) -> str:
        return f"{self.kind}={self.share:g}"


def parse_budget(text: str) -> Budget:
    """`macs=0.5`. Raises UserError for another kind, or a share outside (0, 1)."""
    kind, _, share = text.partition("=")
    if kind not in COSTS:
        raise UserError(f"{shown(text, 60)}: names no known cost, give one of {', '.join(f'{each}=SHARE' for each in COSTS)}")
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UserError(f"{shown(text, 60)}: the share of the dense network must be above 0 and below 1")
    return Budget(kind, value)


@dataclass(frozen=True)
class Sparsity:
    """A penalty, one of `SPARSITIES`, that makes channels small in training, and what it is multiplied with."""

    kind: str
    strength: float


@dataclass(frozen=True)
class PruningSettings:
    """What goes of a network and how. `keep_ratios` holds one proportion for all layers or one a layer; 1 keeps every filter.

    In their place stand a `budget`, the file `ratios_file` that a measurement of sensitivity wrote, of which each layer takes the
    least proportion that costs at most `sensitivity_drop` points, or `sensitivity`, the file that such a measurement is to write.
    `soft_interval` is the number of epochs between soft prunings, None for hard pruning, which takes `steps` steps. `multiple`
    None stands for the one that is measured to be fastest. `reconstruct` is the number of training images by which what is left
    is mended, 0 for as many as the largest layer needs, None for no such thing.
    """

    keep_ratios: Sequence[float] = (1.0,)
    ratios_file: Path | None = None
    sensitivity_drop: float = 1.0
    sensitivity: Path | None = None
    budget: Budget | None = None
    allocation: str = "uniform"
    criterion: str = "filter-nggm"
    gamma: float = 0.5
    gm_distance: str = "euclidean"
    samp_batches: int | None = None
    exclude: Sequence[str] = ()
    coupled: bool = False
    linear: bool = False
    multiple: int | None = 1
    soft_interval: int | None = None
    steps: int = 1
    train_form: str = "auto"
    reconstruct: int | None = None


@dataclass(frozen=True)
class NetworkSettings:
    """The networks of a pruning by name and file: a teacher, and a student that may start as its copy."""

    t_model: str | None = None
    t_path: str | None = None
    s_model: str | None = None
    s_path: str | None = None
    s_copy_t: bool = False

    @property
    def files(self) -> dict[str, tuple[str, str | None]]:
        """The files that are read, by flag: path, and the name that the network must have."""
        named = {"--t-path": (self.t_path, self.t_model), "--s-path": (self.s_path, self.s_model)}
        return {flag: (path, model) for flag, (path, model) in named.items() if path is not None}

    @property
    def scored(self) -> tuple[str, str, str | None]:
        """The flag, path and name of the network that is scored alone: the student's, or else the teacher's."""
        flag = "--s-path" if self.s_path is not None else "--t-path"
        return flag, *self.files[flag]


def check_sensitivity_file(path: Path) -> None:
    """Raises UserError for a file that `measure_sensitivity` could not write."""
    if path.suffix != SENSITIVITY_SUFFIX:
        raise UserError(f"--sensitivity {path}: must end in {SENSITIVITY_SUFFIX}, beside which a picture lies")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UserError(f"--sensitivity {path}: cannot be written, name a file in a folder that you may write to")
