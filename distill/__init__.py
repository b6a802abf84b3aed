"""Distillation losses, by name. A new one is a file of this folder with a `Distiller` under `@register_distiller`.

Every module of the package is imported here, so that a loss registers by being there.
"""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from distill.base import DISTILLERS, Distiller, DistillerEntry, Option, check_facts
from models.outputs import Outputs
from utils.errors import UserError

__all__ = ["DISTILLERS", "Distiller", "DistillerEntry", "Option", "build_distiller", "distiller_options"]


def build_distiller(name: str, *, student: Outputs, teacher: Outputs, **options: Any) -> Distiller:
    """The named loss for two networks of which `student` and `teacher` are sample outputs (any batch size).

    Gives a module with `loss = distiller(student_outputs, teacher_outputs)`, 0-dim, not yet times beta. Options are those
    of `DISTILLERS[name].options`; beside them stand the facts of a run that the loss needs, such as `train_labels` (see
    `Distiller`). Raises UserError for an unknown name or option, a value out of range, or networks that
    the loss cannot compare.
    """
    entry = _entry(name)
    check_facts(name, options)
    for option in options:
        if option not in entry.options and option not in entry.needs:
            choices = ", ".join(entry.options) or "none"
            raise UserError(f"--distill {name}: no option {option!r}: it has {choices}")
    return entry.build(student, teacher, **options)


def distiller_options(names: Iterable[str] = DISTILLERS) -> dict[str, Option]:
    """Options of the named losses (of all by default) by keyword: `{"kd_t": Option(4.0, "temperature ..."), ...}`.

    An entry script turns each into a flag, `--kd-t`, so that a new loss brings its flags along.
    """
    return {key: option for name in names for key, option in _entry(name).options.items()}


def _entry(name: str) -> DistillerEntry:
    if name not in DISTILLERS:
        raise UserError(f"--distill {name}: unknown loss: choose from {', '.join(sorted(DISTILLERS))}")
    return DISTILLERS[name]


for _module in iter_modules(__path__):  # at the end, for some of them use what stands above
    import_module(f"{__name__}.{_module.name}")
