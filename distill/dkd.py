"""DKD: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, equations 4 to 7; it takes the place of KD.

    L = T^2 * (a * KL(b_t || b_s) + b * KL(q_t || q_s)), mean over the batch

b is the pair of probabilities (target class, all others), q the softmax over the other classes alone, both of logits / T.
KD is the same sum with a = 1 and b = 1 - p_t, p_t the teacher's probability of the target: where the teacher is sure, KD
hushes what it knows of the other classes.

Deviation, in form and not in function: the official code takes the target out of the softmax by subtracting 1000, and adds
up probabilities before it takes their logarithm; here both stay logarithms, which also holds for logits far apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.base import Distiller, check_weights, full_precision
from distill.logits import (
    check_classes,
    check_temperature,
    other_classes,
    prepared_logits,
    temperature_setting,
)
from models.outputs import Outputs
from utils.errors import ParameterError


def decoupled_divergences(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(b, classes) logits of both, already divided by T, and (b,) labels -> KL(b_t || b_s) and KL(q_t || q_s), (b,) each."""
    student, teacher = _decoupled(student_logits, labels), _decoupled(teacher_logits, labels)
    return tuple((t.exp() * (t - s)).sum(1) for s, t in zip(student, teacher, strict=True))


def _decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of b, (b, 2), and of q, (b, classes - 1)."""
    target = logits.gather(1, labels.unsqueeze(1))
    others = logits.gather(1, other_classes(labels, classes=logits.shape[1]))
    pair = torch.cat([target, others.logsumexp(1, keepdim=True)], dim=1)
    return F.log_softmax(pair, dim=1), F.log_softmax(others, dim=1)


def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float, alpha: float, beta: float
) -> Tensor:
    """(b, classes) logits of both and (b,) labels -> 0-dim loss; `alpha` weighs the target, `beta` the other classes."""
    target, others = decoupled_divergences(
        full_precision(student_logits) / temperature, full_precision(teacher_logits) / temperature, labels
    )
    return temperature**2 * (alpha * target + beta * others).mean()


class DKD(Distiller):
    """The target's probability and the distribution over the other classes, weighed apart."""

    reads_maps = False

    def __init__(
        self,
        student: Outputs,
        teacher: Outputs,
        *,
        kd_t: float,
        kd_standardize: bool,
        dkd_alpha: float,
        dkd_beta: float,
    ):
        super().__init__()
        check_temperature(kd_t)
        check_weights({"dkd_alpha": dkd_alpha, "dkd_beta": dkd_beta})
        check_classes(student, teacher)
        if student.logits.shape[1] < 2:
            raise ParameterError("loss", "dkd", "needs two classes or more, there is no other class beside the target")
        self.temperature, self.standardize = kd_t, kd_standardize
        self.alpha, self.beta = dkd_alpha, dkd_beta

    def setting(self) -> str:
        logits = temperature_setting(self.temperature, standardize=self.standardize)
        return f"{logits}, alpha {self.alpha:g}, beta {self.beta:g}"

    def loss(self, student: Outputs, teacher: Outputs, *, labels: Tensor) -> Tensor:
        logits = (prepared_logits(outputs, standardize=self.standardize) for outputs in (student, teacher))
        return dkd_loss(*logits, labels, temperature=self.temperature, alpha=self.alpha, beta=self.beta)
