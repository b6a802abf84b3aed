"""A loss in somebody's own Python file, `FILE.py:NAME`: a function of two outputs, or a class as those of this folder are.

What the tests ask of a built-in loss is asked of it when it is built, over a sample of both networks' outputs, and its form in
every step.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from distill.base import Distiller, keywords
from distill.registry import RUN_FACTS, STEP_FACTS
from models.outputs import Outputs
from utils.errors import UserError
from utils.python_file import load_function, naming_lines

INIT_FACTS = tuple(RUN_FACTS)


class OwnLoss(Distiller):
    """The loss of `FILE.py:NAME`, which returns a number whose gradient reaches the student, or says why it does not."""

    def __init__(self, student: Outputs, teacher: Outputs, *, name: str, **facts: Any):
        """`facts` are those of RUN_FACTS that its class names. Raises UserError for whatever goes wrong in it, with its line."""
        super().__init__()
        self.name, found = name, load_function(name)
        self.step_facts = step_facts(name)
        self.function = self.inner = None
        if is_distiller(found):
            with naming_lines(name):
                self.inner = found(student, teacher, **facts)
        else:
            self.function = found

    def loss(self, student: Outputs, teacher: Outputs, **facts: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # it has passed `check` by then
            return self._loss(student, teacher, **facts)
        with naming_lines(self.name):
            loss = self._loss(student, teacher, **facts)
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            found = f"a tensor {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"{self.name}: gives {found}, expected one number, a 0-dim tensor of floats")
        return loss

    def _loss(self, student: Outputs, teacher: Outputs, **facts: Tensor) -> Tensor:
        return self.function(student, teacher, **facts) if self.inner is None else self.inner.loss(student, teacher, **facts)

    def check(self, student: Outputs, teacher: Outputs) -> None:
        """Raises UserError unless the loss of these outputs is finite and its gradient reaches the student's. Leaves no trace."""
        probe, outputs = copy.deepcopy(self), _with_gradients(student)
        device = student.logits.device
        facts = {"indices": torch.arange(len(student.logits), device=device), "epochs": torch.zeros((), device=device)}
        with torch.enable_grad():
            loss = probe(outputs, teacher, **facts)
        if not loss.isfinite():
            raise UserError(f"{self.name}: gives {loss.item()} for a first batch, expected a finite number")
        if not loss.requires_grad:
            raise UserError(f"{self.name}: its gradient does not reach the student: was something detached, or made a number?")
        tensors = [each for each in _tensors(outputs) if each.requires_grad]
        gradients = [each for each in torch.autograd.grad(loss, tensors, allow_unused=True) if each is not None]
        if not gradients:
            raise UserError(f"{self.name}: its gradient does not reach the student: does it read the student's outputs?")
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise UserError(f"{self.name}: its gradient is not finite for a first batch")


def is_distiller(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Distiller)


def step_facts(name: str) -> tuple[str, ...]:
    """Which of STEP_FACTS the loss asks for. Raises UserError where it asks for more."""
    found = load_function(name)
    wanted = keywords(found.loss if is_distiller(found) else found)
    _check_known(name, wanted, STEP_FACTS)
    return wanted


def init_facts(name: str) -> tuple[str, ...]:
    """Which of RUN_FACTS its class asks for. Raises UserError where it asks for more."""
    found = load_function(name)
    wanted = keywords(found.__init__) if is_distiller(found) else ()
    _check_known(name, wanted, INIT_FACTS)
    return wanted


def _check_known(name: str, wanted: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [each for each in wanted if each not in known]
    if unknown:
        raise UserError(f"{name}: asks for {unknown[0]}, which nobody gives it; by keyword it may ask for {', '.join(known)}")


def _tensors(outputs: Outputs) -> list[Tensor]:
    found = [outputs.logits, *outputs.stages, *outputs.blocks, outputs.embedding]
    return [each for each in found if each is not None]


def _with_gradients(outputs: Outputs) -> Outputs:
    """The same outputs as leaves of a graph."""

    def leaf(each: Tensor | None) -> Tensor | None:
        return None if each is None else each.detach().clone().requires_grad_()

    stages, blocks = (tuple(map(leaf, maps)) for maps in (outputs.stages, outputs.blocks))
    return Outputs(leaf(outputs.logits), stages, blocks, leaf(outputs.embedding))
