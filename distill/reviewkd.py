"""ReviewKD: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021; in the place of KD.

The student's stages are fused from the last to the first: what is learned late reviews what was learned early. Each step is
an ABF (attention-based fusion), with x the stage's map and y the fused map of the stage behind it:

    x = BN(conv1x1(x))    y = resized to x    (u, v) = sigmoid(conv1x1([x, y]))    fused = u * x + v * y
    output = BN(conv3x3(fused resized to the teacher's stage))

and each output is compared with the teacher's map by HCL (hierarchical context loss): with P_l the average pooling to l x l,

    (mse(s, t) + sum over l in 4, 2, 1 of 2^-i * mse(P_l(s), P_l(t))) / (1 + sum of the weights), i = 1, 2, 3 in this order,

of those l alone that are smaller than the map. As in the official code the pooled embedding is one more stage, the last.

Deviations: maps are taken after their activation, where the official code takes the teacher's, and of some students their
own, before it; batch norm keeps no running statistics, for the loss is a thing of training.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.base import BatchNorm, Distiller, full_precision
from models.outputs import Outputs
from utils.errors import ParameterError

MOST_FUSED_CHANNELS = 512
LEVELS = (4, 2, 1)  # pixels a side


def hcl_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Maps (b, c, h, w) of each stage, pairwise of one shape -> 0-dim loss, the sum over stages."""
    return sum(_hierarchical(student, teacher) for student, teacher in zip(student_maps, teacher_maps, strict=True))


def _hierarchical(student: Tensor, teacher: Tensor) -> Tensor:
    levels = [side for side in LEVELS if side < min(student.shape[2:])]
    weights = [2.0**-position for position in range(len(levels) + 1)]
    # Pooling is linear: pooled differences are differences of what is pooled.
    difference = student - teacher
    terms = [difference.square().mean(), *(F.adaptive_avg_pool2d(difference, side).square().mean() for side in levels)]
    return sum(weight * term for weight, term in zip(weights, terms, strict=True)) / sum(weights)


class ABF(nn.Module):
    """Attention-based fusion of a stage's map with the fused map of the stage behind it."""

    def __init__(self, channels: int, fused_channels: int, teacher_channels: int, *, fuses: bool):
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels, fused_channels, 1, bias=False), BatchNorm(fused_channels))
        self.expand = nn.Sequential(
            nn.Conv2d(fused_channels, teacher_channels, 3, padding=1, bias=False), BatchNorm(teacher_channels)
        )
        self.attention = nn.Conv2d(2 * fused_channels, 2, 1) if fuses else None
        for conv in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)  # as the official code does

    def forward(self, x: Tensor, behind: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(b, channels, h, w) and the fused map behind -> the output, (b, teacher_channels, *size), and the fused map."""
        x = self.reduce(x)
        if self.attention is not None:
            behind = F.interpolate(behind, x.shape[2:])
            weights = self.attention(torch.cat([x, behind], dim=1)).sigmoid()  # (b, 2, h, w)
            x = x * weights[:, :1] + behind * weights[:, 1:]
        x = F.interpolate(x, tuple(size)) if tuple(size) != tuple(x.shape[2:]) else x
        return self.expand(x), x


class ReviewKD(Distiller):
    """The teacher's stages from fused stages of the student. Its parameters train with the student's."""

    def __init__(self, student: Outputs, teacher: Outputs):
        super().__init__()
        if len(student.stages) != len(teacher.stages):
            raise ParameterError(
                "loss",
                "reviewkd",
                f"the student has {len(student.stages)} stages, the teacher {len(teacher.stages)}: "
                "ReviewKD fuses stage by stage and needs two networks with the same number of stages",
            )
        channels = [feature_map.shape[1] for feature_map in _levels(student)]
        teacher_channels = [feature_map.shape[1] for feature_map in _levels(teacher)]
        fused, last = min(MOST_FUSED_CHANNELS, channels[-1]), len(channels) - 1
        self.fusions = nn.ModuleList(
            ABF(own, fused, other, fuses=stage < last)
            for stage, (own, other) in enumerate(zip(channels, teacher_channels, strict=True))
        )

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        teacher_maps = [full_precision(feature_map) for feature_map in _levels(teacher)]
        outputs, fused = [], None
        for fusion, own, other in reversed(list(zip(self.fusions, _levels(student), teacher_maps, strict=True))):
            output, fused = fusion(full_precision(own), fused, other.shape[2:])
            outputs.insert(0, output)
        return hcl_loss(outputs, teacher_maps)


def _levels(outputs: Outputs) -> list[Tensor]:
    """The maps of the stages, and the embedding as a map of one pixel."""
    return [*outputs.stages, outputs.embedding[:, :, None, None]]
