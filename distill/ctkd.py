"""CTKD: Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, with one temperature for all images.

    L = KD at T = 1 + 20 * sigmoid(theta)

theta is learned against the student: its gradient is turned round, times a factor that rises along a cosine from 0 to 1 over
the first epochs; the constants are those of the official code. theta trains with the student's optimizer.
"""

import math

import torch
from torch import Tensor, nn

from distill.base import Distiller, full_precision
from distill.kd import kd_loss
from distill.logits import check_classes
from models.outputs import Outputs
from utils.errors import ParameterError

LOWEST, RANGE = 1.0, 20.0  # of temperatures


class _ReversedGradient(torch.autograd.Function):
    """The value itself; its gradient times `-factor`."""

    @staticmethod
    def forward(ctx, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return -factor * gradient, None


def reversal_factor(epochs: Tensor, *, rise_epochs: float) -> Tensor:
    """How strongly the gradient is turned round after `epochs`: from nearly 0 in the first to 1, by whole epochs; 0-dim."""
    epoch = (epochs.floor() + 1).clamp(max=rise_epochs)
    return (1 - (math.pi / rise_epochs * epoch).cos()) / 2


class CTKD(Distiller):
    """KD at a temperature that is learned to make it hard. It trains with the student's parameters."""

    reads_maps = False

    def __init__(self, student: Outputs, teacher: Outputs, *, ctkd_epochs: int):
        super().__init__()
        if ctkd_epochs < 1:
            raise ParameterError("ctkd_epochs", ctkd_epochs, "must be 1 or more")
        check_classes(student, teacher)
        self.rise_epochs = ctkd_epochs
        self.theta = nn.Parameter(torch.ones(()))

    def setting(self) -> str:
        return f"T learned, against it over {self.rise_epochs} epochs"

    def loss(self, student: Outputs, teacher: Outputs, *, epochs: Tensor) -> Tensor:
        theta = _ReversedGradient.apply(self.theta, reversal_factor(epochs, rise_epochs=self.rise_epochs))
        temperature = LOWEST + RANGE * theta.sigmoid()
        logits = (full_precision(outputs.logits) for outputs in (student, teacher))
        return kd_loss(*logits, temperature=temperature)
