"""What the losses over logits share: checks of the two networks, and standardisation."""

import math

import torch
from torch import Tensor

from distill.base import full_precision
from models.outputs import Outputs
from utils.errors import ParameterError, UserError

SMALLEST_DEVIATION = 1e-7  # as the official code of the standardisation has it


def check_temperature(temperature: float) -> None:
    """Raises ParameterError unless the temperature is a positive number."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ParameterError("kd_t", temperature, "the temperature must be a positive number")


def temperature_setting(temperature: float, *, standardize: bool = False) -> str:
    """How a formula shows what is done to the logits first: `T 4`."""
    return f"T {temperature:g}, logits standardised" if standardize else f"T {temperature:g}"


def check_classes(student: Outputs, teacher: Outputs) -> None:
    """Raises UserError unless both networks know equally many classes."""
    if student.logits.shape[1] != teacher.logits.shape[1]:
        raise UserError(
            f"the teacher knows {teacher.logits.shape[1]} classes, the student {student.logits.shape[1]}: "
            "distillation needs the same classes"
        )


def prepared_logits(outputs: Outputs, *, standardize: bool) -> Tensor:
    """(b, classes) in full precision, as they are or standardised."""
    logits = full_precision(outputs.logits)
    return standardized(logits) if standardize else logits


def standardized(logits: Tensor) -> Tensor:
    """Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024: `(z - mean) / std` of each image's logits.

    (b, classes) -> (b, classes). The deviation is the sample's (over classes - 1), as in the official code.
    """
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + SMALLEST_DEVIATION)


def other_classes(labels: Tensor, *, classes: int) -> Tensor:
    """(b,) labels -> (b, classes - 1): the columns of all classes but the target, without asking the device."""
    columns = torch.arange(classes - 1, device=labels.device)
    return columns + (columns >= labels.unsqueeze(1))
