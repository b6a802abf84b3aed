"""KD: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NeurIPS workshop 2014.

    L = T^2 * KL(softmax(t / T) || softmax(s / T)), mean over the batch

with logits s of the student and t of the teacher. T^2 keeps the gradient's size independent of the temperature T. With
`kd_standardize` the logits of each image are brought to mean 0 and deviation 1 first (Sun et al., "Logit Standardization in
Knowledge Distillation", CVPR 2024, where T = 2 and the loss weighs 9).
"""

import torch.nn.functional as F
from torch import Tensor

from distill.base import Distiller, full_precision
from distill.logits import (
    check_classes,
    check_temperature,
    prepared_logits,
    temperature_setting,
)
from models.outputs import Outputs


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """(b, classes) logits of both -> 0-dim loss."""
    student = F.log_softmax(full_precision(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(full_precision(teacher_logits) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class KD(Distiller):
    """Softened class probabilities."""

    reads_maps = False

    def __init__(self, student: Outputs, teacher: Outputs, *, kd_t: float, kd_standardize: bool):
        super().__init__()
        check_temperature(kd_t)
        check_classes(student, teacher)
        self.temperature, self.standardize = kd_t, kd_standardize

    def setting(self) -> str:
        return temperature_setting(self.temperature, standardize=self.standardize)

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        logits = (prepared_logits(outputs, standardize=self.standardize) for outputs in (student, teacher))
        return kd_loss(*logits, temperature=self.temperature)
