"""DIST: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, equations 6 to 10; in the place of KD.

    L = T^2 * (b * (1 - mean over images of r(s_i, t_i)) + c * (1 - mean over classes of r(s^j, t^j)))

r is Pearson's correlation; s_i is the student's softmax(z / T) of image i, over the classes, and s^j that of class j, over the
images of a batch. Only how probabilities rise and fall together counts, not their size, so a teacher that is far ahead of
its student asks for nothing that the student cannot give.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from distill.base import Distiller, check_weights, full_precision
from distill.logits import check_classes, check_temperature, temperature_setting
from models.outputs import Outputs

EPSILON = 1e-8


def pearson(a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    """Pearson's correlation along `dim` of two tensors of one shape; 0 where either is constant.

    EPSILON is added to the product of both lengths, as in the official code: where both are small, as in softmax
    probabilities of many classes, that turns the gradient.
    """
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    return (a * b).sum(dim) / (vector_norm(a, dim=dim) * vector_norm(b, dim=dim) + EPSILON)


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, beta: float, gamma: float) -> Tensor:
    """(b, classes) logits of both -> 0-dim loss; `beta` weighs the relation between classes, `gamma` that between images."""
    student = F.softmax(full_precision(student_logits) / temperature, dim=1)
    teacher = F.softmax(full_precision(teacher_logits) / temperature, dim=1)
    between_classes = 1 - pearson(student, teacher, dim=1).mean()
    between_images = 1 - pearson(student, teacher, dim=0).mean()
    return temperature**2 * (beta * between_classes + gamma * between_images)


class DIST(Distiller):
    """Correlation of class probabilities, within an image and within a batch."""

    reads_maps = False

    def __init__(self, student: Outputs, teacher: Outputs, *, kd_t: float, dist_beta: float, dist_gamma: float):
        super().__init__()
        check_temperature(kd_t)
        check_weights({"dist_beta": dist_beta, "dist_gamma": dist_gamma})
        check_classes(student, teacher)
        self.temperature, self.beta, self.gamma = kd_t, dist_beta, dist_gamma

    def setting(self) -> str:
        return f"{temperature_setting(self.temperature)}, beta {self.beta:g}, gamma {self.gamma:g}"

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        return dist_loss(student.logits, teacher.logits, temperature=self.temperature, beta=self.beta, gamma=self.gamma)
