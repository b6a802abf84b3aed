"""What a pass over images adds up to: sums on the device, read once in a while, accuracy over images."""

from collections.abc import Mapping

import torch
from torch import Tensor

from utils.distributed import sum_over_processes
from utils.errors import NonFiniteLoss

NEVER = 2**62
CHANCE_MARGIN = 1.2  # a network that is right at most so many times as often as guessing is scored as guessing


def is_at_chance(top1: float, *, num_classes: int) -> bool:
    """Whether an accuracy in percent is that of guessing one of so many classes."""
    return top1 <= CHANCE_MARGIN * (100 / num_classes)


def label_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) how many classes come before the label; of equal logits the lower class comes first, NaN comes before all."""
    own = logits.gather(1, labels[:, None])  # (B, 1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    behind = (logits < own) | ((logits == own) & (classes >= labels[:, None]))
    return (~behind).sum(1)


class Sums:
    """Sums over the images of one pass. `add` never waits for the device; `read` does, and adds up all processes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.totals: dict[str, Tensor] = {}
        self.first_bad_step = torch.tensor(NEVER, device=device)

    def add(self, losses: dict[str, Tensor], logits: Tensor, labels: Tensor, *, step: int = 0) -> Tensor:
        """Adds a batch: 0-dim mean losses by name (`loss` among them), logits (b, classes), labels (b,).

        Gives (b,) whether each image is classified rightly, on the device.
        """
        count, rank = len(labels), label_rank(logits, labels)
        parts = {name: loss.double() * count for name, loss in losses.items()}
        parts |= {"top1": (rank < 1).sum().double(), "top5": (rank < 5).sum().double()}
        parts["images"] = torch.full((), count, dtype=torch.float64, device=self.device)
        for name, part in parts.items():
            self.totals[name] = self.totals[name] + part if name in self.totals else part
        bad = torch.where(torch.isfinite(losses["loss"]), NEVER, step)
        self.first_bad_step = torch.minimum(self.first_bad_step, bad)
        return rank < 1

    def read(self) -> dict[str, float]:
        """Mean losses, top-1 and top-5 accuracy in percent, and the number of images, over all processes."""
        totals = torch.stack(list(self.totals.values()))
        sum_over_processes(totals)
        values = dict(zip(self.totals, totals.tolist(), strict=True))
        images = values.pop("images")
        means = {name: value / images for name, value in values.items()}
        means["top1"], means["top5"] = 100 * means["top1"], 100 * means["top5"]
        return {**means, "images": int(images)}

    def check_finite(self, *, epoch: int) -> None:
        """Raises NonFiniteLoss, naming the step, if any loss so far was not a finite number, in any process."""
        bad = (self.first_bad_step < NEVER).long()
        sum_over_processes(bad)
        if bad:
            first = int(self.first_bad_step)
            where = f"step {first + 1}" if first < NEVER else "another process"
            raise NonFiniteLoss(f"the loss is no finite number at epoch {epoch + 1}, {where}; try a lower --lr")

    def state_dict(self) -> dict[str, Tensor]:
        """This process's sums, on the CPU."""
        return {name: value.cpu() for name, value in {**self.totals, "first_bad_step": self.first_bad_step}.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        totals = {name: value.to(self.device) for name, value in state.items()}
        self.first_bad_step = totals.pop("first_bad_step")
        self.totals = totals


@torch.no_grad()
def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first floating-point tensor that holds NaN or an infinite number; the device is waited for once."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return None
    finite = torch.stack([tensor.isfinite().all() for tensor in floating.values()]).tolist()
    return next((name for name, good in zip(floating, finite, strict=True) if not good), None)
