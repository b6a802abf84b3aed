"""Distillation losses, by name (`distill.registry`), each in a file of its own that is imported when the loss is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.registry import DISTILLERS, DistillerEntry, Option, check_facts, distiller_options, entry_of
from utils.errors import ParameterError

if TYPE_CHECKING:
    from distill.base import Distiller
    from models.outputs import Outputs

__all__ = ["DISTILLERS", "DistillerEntry", "Option", "build_distiller", "distiller_options"]


def build_distiller(name: str, *, student: Outputs, teacher: Outputs, **options: Any) -> Distiller:
    """The named loss for two networks of which `student` and `teacher` are sample outputs (any batch size).

    Gives a module with `loss = distiller(student_outputs, teacher_outputs)`, 0-dim, not yet times beta. Options are those
    of `DISTILLERS[name].options`; beside them stand the facts of a run that the loss needs, such as `train_labels` (see
    `Distiller`). Raises UserError for an unknown name or option, a value out of range, or networks that
    the loss cannot compare.
    """
    entry = entry_of(name)
    check_facts(name, options)
    for option in options:
        if option not in entry.options and option not in entry.needs:
            raise ParameterError("loss", name, f"has no option {option!r}, it has {', '.join(entry.options) or 'none'}")
    return entry.build(student, teacher, **options)
