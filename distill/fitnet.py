"""FitNet: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3, trained in one stage beside the labels.

    L = mean((r(f_s) - f_t)^2),  r = ReLU(BN(conv(f_s)))

f is the map of one stage. The regressor's convolution brings the student's map to the teacher's channels and size as
RepDistiller's does: 3x3 of stride 2 where it is twice as large, a transposed 4x4 of stride 2 where half as large, and one of
as many pixels as the sizes differ where it is larger otherwise. Any other map is resized and goes through a 1x1 convolution.

Deviation: batch norm keeps no running statistics, for the loss is a thing of training.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from distill.base import BatchNorm, Distiller, full_precision
from models.outputs import Outputs
from utils.errors import ParameterError

USUAL_STAGE = 2  # of those that both networks have, where nobody says which


class Regressor(nn.Module):
    """A student's map in the shape of the teacher's: (b, c_s, *student_size) -> (b, c_t, *teacher_size)."""

    def __init__(self, student: Sequence[int], teacher: Sequence[int]):
        super().__init__()
        (_, own, *own_size), (_, other, *other_size) = student, teacher
        self.size = tuple(other_size)
        if own_size == [2 * side for side in other_size]:
            self.conv = nn.Conv2d(own, other, 3, stride=2, padding=1)
        elif other_size == [2 * side for side in own_size]:
            self.conv = nn.ConvTranspose2d(own, other, 4, stride=2, padding=1)
        elif all(a >= b for a, b in zip(own_size, other_size, strict=True)):
            self.conv = nn.Conv2d(own, other, [1 + a - b for a, b in zip(own_size, other_size, strict=True)])
        else:
            self.conv = nn.Sequential(nn.Upsample(self.size), nn.Conv2d(own, other, 1))
        self.norm = BatchNorm(other)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class FitNet(Distiller):
    """One stage of the teacher from the same stage of the student. Its parameters train with the student's."""

    def __init__(self, student: Outputs, teacher: Outputs, *, fitnet_stage: int | None):
        super().__init__()
        count = min(len(student.stages), len(teacher.stages))
        if fitnet_stage is None:
            fitnet_stage = min(USUAL_STAGE, count)
        if not 1 <= fitnet_stage <= count:
            raise ParameterError("fitnet_stage", fitnet_stage, f"both networks have {count} stages: choose from 1 to that")
        self.stage = fitnet_stage
        self.regressor = Regressor(*(tuple(outputs.stages[self.stage - 1].shape) for outputs in (student, teacher)))

    def setting(self) -> str:
        return f"stage {self.stage}"

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        own, other = (full_precision(outputs.stages[self.stage - 1]) for outputs in (student, teacher))
        return F.mse_loss(self.regressor(own), other)
