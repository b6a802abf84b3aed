"""SP: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, equations 2 to 4.

    G(F) = rownorm(F F^T), F the last map before pooling as (b, chw);  L = norm_F(G_s - G_t)^2 / b^2

The images of a batch are compared with each other, so only the batch sizes of the two networks must agree.
"""

import torch.nn.functional as F
from torch import Tensor

from distill.base import Distiller, full_precision, row_similarity
from models.outputs import Outputs


def sp_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """(b, c, h, w) of both, c, h and w free to differ -> 0-dim loss."""
    return F.mse_loss(_similarity(student_map), _similarity(teacher_map))  # the mean over (b, b) is norm_F^2 / b^2


def _similarity(feature_map: Tensor) -> Tensor:
    return row_similarity(full_precision(feature_map).flatten(1))  # (b, chw) -> (b, b)


class SP(Distiller):
    """Pairwise similarity of a batch's images in the last map."""

    def __init__(self, student: Outputs, teacher: Outputs):
        super().__init__()

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        return sp_loss(student.stages[-1], teacher.stages[-1])
