"""KD: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NeurIPS workshop 2014.

    L = T^2 * KL(softmax(t / T) || softmax(s / T)), mean over the batch

with logits s of the student and t of the teacher. T^2 keeps the gradient's size independent of the temperature T.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from distill.base import Distiller, full_precision, register_distiller
from models.outputs import Outputs
from utils.errors import UserError


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """(b, classes) logits of both -> 0-dim loss."""
    student = F.log_softmax(full_precision(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(full_precision(teacher_logits) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


@register_distiller("kd", beta=None, kd_t="temperature of KD's softened class probabilities")
class KD(Distiller):
    """Softened class probabilities."""

    def __init__(self, student: Outputs, teacher: Outputs, *, kd_t: float = 4.0):
        super().__init__()
        if not (math.isfinite(kd_t) and kd_t > 0):
            raise UserError(f"--kd-t {kd_t}: the temperature must be a positive number")
        if student.logits.shape[1] != teacher.logits.shape[1]:
            raise UserError(
                f"--t-model: the teacher knows {teacher.logits.shape[1]} classes, the student {student.logits.shape[1]}: "
                "distillation needs the same classes"
            )
        self.temperature = kd_t

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        return kd_loss(student.logits, teacher.logits, temperature=self.temperature)
