"""NKD: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023; in the place of KD.

    L = mean over images of (-p^t_y log p^s_y - g T^2 sum over i != y of q^t_i log q^s_i)

p is the softmax and y the target; q is the softmax of z / T over the other classes alone, which sum to 1 in both networks.
"""

import torch.nn.functional as F
from torch import Tensor

from distill.base import Distiller, full_precision
from distill.logits import check_classes, other_classes
from models.outputs import Outputs
from utils.errors import ParameterError


def nkd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float, gamma: float) -> Tensor:
    """(b, classes) logits of both and (b,) labels -> 0-dim loss; `gamma` weighs the other classes."""
    student, teacher = full_precision(student_logits), full_precision(teacher_logits)
    target = labels.unsqueeze(1)
    sure = F.softmax(teacher, dim=1).gather(1, target)
    own = F.log_softmax(student, dim=1).gather(1, target)
    columns = other_classes(labels, classes=student.shape[1])
    others = F.log_softmax(student.gather(1, columns) / temperature, dim=1)
    expected = F.softmax(teacher.gather(1, columns) / temperature, dim=1)
    return -(sure * own).mean() - gamma * temperature**2 * (expected * others).sum(1).mean()


class NKD(Distiller):
    """The target weighed by the teacher's probability of it, and the distribution over the other classes."""

    reads_maps = False

    def __init__(self, student: Outputs, teacher: Outputs, *, nkd_t: float, nkd_gamma: float):
        super().__init__()
        if not nkd_t > 0:
            raise ParameterError("nkd_t", nkd_t, "the temperature must be a positive number")
        check_classes(student, teacher)
        if student.logits.shape[1] < 2:
            raise ParameterError("loss", "nkd", "needs two classes or more, there is no other class beside the target")
        self.temperature, self.gamma = nkd_t, nkd_gamma

    def setting(self) -> str:
        return f"T {self.temperature:g}, gamma {self.gamma:g}"

    def loss(self, student: Outputs, teacher: Outputs, *, labels: Tensor) -> Tensor:
        return nkd_loss(student.logits, teacher.logits, labels, temperature=self.temperature, gamma=self.gamma)
