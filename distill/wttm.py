"""WTTM: Zheng & Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024; in the place of KD.

    L = mean over images of U * KL(q || softmax(s)),  q_i = p_i^g / U,  U = sum_i p_i^g,  p = softmax(t)

The teacher's probabilities are raised to the power g = 1 / T, which is its softmax at temperature T; the student's stay as
they are. U, their sum before they are normalised, weighs the image: it is larger where the teacher is less sure.
"""

import torch.nn.functional as F
from torch import Tensor

from distill.base import Distiller, full_precision
from distill.logits import check_classes
from models.outputs import Outputs
from utils.errors import ParameterError


def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, *, gamma: float) -> Tensor:
    """(b, classes) logits of both and the exponent of the teacher's probabilities -> 0-dim loss."""
    student = F.log_softmax(full_precision(student_logits), dim=1)
    powers = gamma * F.log_softmax(full_precision(teacher_logits), dim=1)
    weights = powers.logsumexp(1, keepdim=True)  # log U, (b, 1)
    teacher = powers - weights
    divergence = (teacher.exp() * (teacher - student)).sum(1, keepdim=True)
    return (weights.exp() * divergence).mean()


class WTTM(Distiller):
    """The teacher's probabilities at a temperature, the student's without one, weighed by how unsure the teacher is."""

    reads_maps = False

    def __init__(self, student: Outputs, teacher: Outputs, *, wttm_gamma: float):
        super().__init__()
        if not 0 < wttm_gamma <= 1:
            raise ParameterError("wttm_gamma", wttm_gamma, "must be above 0 and at most 1, the temperature is its inverse")
        check_classes(student, teacher)
        self.gamma = wttm_gamma

    def setting(self) -> str:
        return f"gamma {self.gamma:g}"

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        return wttm_loss(student.logits, teacher.logits, gamma=self.gamma)
