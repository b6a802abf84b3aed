"""A user's own criteria and losses, as their file holds them: good ones, and one for each mistake."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.base import Distiller
from models.outputs import Outputs


def largest_weight(weight: Tensor) -> Tensor:
    return weight.abs().flatten(1).amax(1)


def sensitivity(weight: Tensor, *, grad: Tensor) -> Tensor:
    return (weight * grad).abs().flatten(1).sum(1)


def map_energy(weight: Tensor, *, feature_maps: Tensor) -> Tensor:
    return feature_maps


map_energy.of_maps = lambda maps: maps.square().mean((2, 3))


def of_no_maps(weight: Tensor, *, feature_maps: Tensor) -> Tensor:
    return feature_maps


def asks_for_more(weight: Tensor, *, weather: Tensor) -> Tensor:
    return weather


def too_few(weight: Tensor) -> Tensor:
    return weight.sum().reshape(1)


def not_finite(weight: Tensor) -> Tensor:
    return weight.flatten(1).sum(1) / 0


def raises(weight: Tensor) -> Tensor:
    return weight.flatten(7)


def logit_distance(student: Outputs, teacher: Outputs) -> Tensor:
    return F.mse_loss(student.logits, teacher.logits)


logit_distance.reads_maps = False
logit_distance.beta = 2.5


def labelled(student: Outputs, teacher: Outputs, *, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.logits - teacher.logits, labels)


class Matched(Distiller):
    """Parameters of its own, which train with the student."""

    def __init__(self, student: Outputs, teacher: Outputs):
        super().__init__()
        self.match = nn.Conv2d(student.stages[-1].shape[1], teacher.stages[-1].shape[1], 1)

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        return F.mse_loss(self.match(student.stages[-1]), teacher.stages[-1])


def an_image_each(student: Outputs, teacher: Outputs) -> Tensor:
    return (student.logits - teacher.logits).square().mean(1)


def a_number(student: Outputs, teacher: Outputs) -> float:
    return float((student.logits - teacher.logits).square().mean())


def detached(student: Outputs, teacher: Outputs) -> Tensor:
    return F.mse_loss(student.logits.detach(), teacher.logits)


def infinite(student: Outputs, teacher: Outputs) -> Tensor:
    return (student.logits / 0).square().mean()


def infinite_slope(student: Outputs, teacher: Outputs) -> Tensor:
    return (student.logits - student.logits.detach()).abs().sqrt().sum()


def fails(student: Outputs, teacher: Outputs) -> Tensor:
    return student.logits @ torch.ones(3, 3)


def kd(student: Outputs, teacher: Outputs) -> Tensor:
    return logit_distance(student, teacher)


def asks_for_time(student: Outputs, teacher: Outputs, *, clock: Tensor) -> Tensor:
    return clock


def of_its_group(weight: Tensor, *, group_squares: Tensor, removal_order: Tensor) -> Tensor:
    return group_squares * removal_order
