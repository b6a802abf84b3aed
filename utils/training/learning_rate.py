"""The learning rate of every step: in steps, or falling linearly or along a cosine, with a warm-up before it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

FEW_EPOCHS = 20  # a training of at most so many has no time to rise to its rate and fall again
LR_SCHEDULES = ("steps", "linear", "cosine")


@dataclass(frozen=True)
class LearningRate:
    """`lr` as `kind` changes it over `n_epochs` epochs, the first `warmup_epochs` of which it rises linearly.

    "steps" multiplies it by each factor of `lr_drops` from the epoch in `schedule` on, counted from 0; "linear" and
    "cosine" (Loshchilov & Hutter, "SGDR", ICLR 2017, equation 5, without restarts) bring it to 0 at the end of the last
    epoch, from one step to the next.
    """

    lr: float
    n_epochs: int
    kind: str = "steps"
    schedule: Sequence[int] = ()
    lr_drops: Sequence[float] = ()
    warmup_epochs: int = 0

    def at(self, epoch: int, step: int = 0, *, steps: int = 1) -> float:
        """The rate of `step` of an epoch's `steps`, both it and `epoch` counted from 0."""
        done, warmup = epoch + step / steps, self.warmup_epochs
        rising = min((done + 1 / steps) / warmup, 1.0) if warmup else 1.0
        return self._falling(epoch, max(done - warmup, 0.0) / max(self.n_epochs - warmup, 1)) * rising

    def _falling(self, epoch: int, share: float) -> float:
        """The rate without a warm-up, `share` of the epochs behind it being done."""
        if self.kind == "linear":
            return self.lr * (1 - share)
        if self.kind == "cosine":
            return self.lr * (1 + math.cos(math.pi * share)) / 2
        lr = self.lr
        for milestone, factor in zip(self.schedule, self.lr_drops, strict=True):
            if epoch >= milestone:
                lr *= factor
        return lr

    def fitted(self, n_epochs: int, *, rises: bool) -> tuple[list[int], list[float]]:
        """Epochs and factors for a training of `n_epochs`: of one that is shorter than this in proportion.

        A shorter one has no factor at epoch 0, and those that come together are one. Factors above 1 are left out unless the
        rate `rises`, and of a training of FEW_EPOCHS.
        """
        share = min(n_epochs / self.n_epochs, 1.0)
        rises = rises and n_epochs > FEW_EPOCHS
        found: dict[int, float] = {}
        for epoch, factor in zip(self.schedule, self.lr_drops, strict=True):
            place = max(round(share * epoch), min(epoch, 1))
            if (factor <= 1 or rises) and (place < n_epochs or share == 1):
                found[place] = found.get(place, 1.0) * factor
        return list(found), list(found.values())

    def remarks(self) -> list[str]:
        """What its user may not have meant: epochs of the schedule that lie behind the last one, all of them."""
        late = [epoch for epoch in self.schedule if epoch >= self.n_epochs > 0]
        if not late:
            return []
        epochs, lies = " ".join(map(str, late)), "lies" if len(late) == 1 else "lie"
        return [f"--schedule {epochs} {lies} behind the last epoch, {self.n_epochs - 1}: the learning rate will not change there"]

    def describe(self) -> str:
        """What a plan says of it."""
        rise = f"rising over {self.warmup_epochs} epochs to " if self.warmup_epochs else ""
        if self.kind != "steps":
            return f"{rise}{self.lr:.4g}, then falling to 0 over the {self.n_epochs} epochs ({self.kind})"
        rates = [(epoch, self._falling(epoch, 0)) for epoch in sorted({0, *self.schedule}) if epoch < self.n_epochs]
        turns = [rates[0], *(later for before, later in pairwise(rates) if later[1] != before[1])]
        return rise + ", ".join(f"{rate:.4g} from epoch {epoch + 1}" for epoch, rate in turns)
