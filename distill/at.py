"""AT: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2 with activation maps of p = 2.

    L = sum over stages of mean((A_s - A_t)^2),  A(f) = normalize(vec(mean_c f^2)) per image

As in the official code this is the mean over images and positions, not the paper's norm. Where student and teacher maps
differ in size, the larger one is average-pooled to the smaller.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distill.base import Distiller, attention_map, channel_energy
from models.outputs import Outputs
from utils.errors import ParameterError

IMAGENET_STAGES = 4  # networks of so many stages are taken for those for ImageNet, of which the last two are compared


def at_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Maps (b, c, h, w) of each stage, pairwise; channels and sizes of a pair may differ -> 0-dim loss."""
    return sum(_stage_loss(student, teacher) for student, teacher in zip(student_maps, teacher_maps, strict=True))


def _stage_loss(student: Tensor, teacher: Tensor) -> Tensor:
    size = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    return F.mse_loss(attention_map(channel_energy(student), size), attention_map(channel_energy(teacher), size))


class AT(Distiller):
    """Attention maps at the end of each stage; of ImageNet networks, and where one has more, of the last ones."""

    def __init__(self, student: Outputs, teacher: Outputs, *, at_stages: int):
        super().__init__()
        count = min(len(student.stages), len(teacher.stages))
        if not 0 <= at_stages <= count:
            raise ParameterError("at_stages", at_stages, f"both networks have {count} stages: choose from 1 to that")
        self.is_chosen = at_stages > 0
        self.last_stages = at_stages or (2 if count >= IMAGENET_STAGES else count)

    def setting(self) -> str:
        return f"last stages {self.last_stages}" if self.is_chosen else ""

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        return at_loss(student.stages[-self.last_stages :], teacher.stages[-self.last_stages :])
