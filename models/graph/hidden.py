"""What a network does while it is traced that no graph holds: modes of gradients and of precision, and random numbers.

torch.fx records operations on tensors. That they run under `torch.no_grad`, `torch.inference_mode` or `torch.autocast` is lost,
and a number that Python, NumPy or torch draws beside them is frozen to what came out at the time. Each such thing is laid to
the module whose own forward pass does it, so that this one can stay the network's own code.
"""

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

_Autocast = torch.amp.autocast_mode.autocast


@dataclass(frozen=True)
class Hidden:
    """What the forward pass of the module `path` does beside its operations; "" is the network itself.

    `changes_results`: the results depend on it, not the gradients alone.
    """

    path: str
    what: str
    changes_results: bool


class _Modes(NamedTuple):
    gradients: bool
    inference: bool
    precision: Any  # None without autocast
    autocasts: int  # that were entered, those that turn it off as well


class Watch:
    """Sees what a graph will not hold while `network`, on a device of type `device`, is traced."""

    def __init__(self, network: nn.Module, device: str):
        self.hidden: list[Hidden] = []
        self._device, self._autocasts = device, 0
        self._own_generators = [value for module in network.modules() for value in vars(module).values() if _draws(value)]

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """In here gradients are on, whoever asks; modes that the network sets and leaves behind end with it."""
        with torch.inference_mode(False), torch.enable_grad(), self._counted_autocasts():
            self._calls = [("", self._modes())]
            self._streams = self._random_streams()
            try:
                yield
                self._ascribe_draws()
            finally:
                torch._C._set_grad_enabled(True)

    @contextmanager
    def inside(self, path: str) -> Iterator[None]:
        """While the forward pass of the module `path` runs."""
        self._ascribe_draws()
        self._calls.append((path, self._modes()))
        try:
            yield
            self._ascribe_draws()
        finally:
            self._calls.pop()

    def has_other_modes(self) -> bool:
        """Whether an operation that is recorded now runs in another mode than the graph will."""
        return self._modes() != self._calls[0][1]

    def note_operation(self, line: str) -> None:
        """Lays the mode of an operation at `line` to the innermost module that was called without it."""
        usual, now = self._calls[0][1], self._modes()
        path = next(path for path, modes in reversed(self._calls) if modes == usual)
        if now.precision != usual.precision:
            self._note(path, f"runs under torch.autocast at {line}", changes_results=True)
        elif now.autocasts != usual.autocasts:
            self._note(path, f"sets torch.autocast at {line}", changes_results=False)
        else:
            mode = "torch.inference_mode" if now.inference else "torch.no_grad"
            self._note(path, f"runs under {mode} at {line}", changes_results=False)

    def _note(self, path: str, what: str, *, changes_results: bool) -> None:
        if path not in {hidden.path for hidden in self.hidden if hidden.changes_results >= changes_results}:
            self.hidden.append(Hidden(path, what, changes_results))

    def _modes(self) -> _Modes:
        knows = torch.amp.is_autocast_available(self._device)
        precision = torch.get_autocast_dtype(self._device) if knows and torch.is_autocast_enabled(self._device) else None
        return _Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), precision, self._autocasts)

    @contextmanager
    def _counted_autocasts(self) -> Iterator[None]:
        def enter(context: Any) -> Any:
            self._autocasts += 1
            return before[0](context)

        def leave(context: Any, *error: Any) -> Any:
            self._autocasts -= 1
            return before[1](context, *error)

        before = _Autocast.__enter__, _Autocast.__exit__
        _Autocast.__enter__, _Autocast.__exit__ = enter, leave
        try:
            yield
        finally:
            _Autocast.__enter__, _Autocast.__exit__ = before

    def _ascribe_draws(self) -> None:
        streams = self._random_streams()
        if streams != self._streams:
            self._note(self._calls[-1][0], "draws random numbers in its Python", changes_results=True)
        self._streams = streams

    def _random_streams(self) -> tuple[Any, ...]:
        """The state of every global random stream, of torch's on the network's device, and of those that its modules have."""
        _, words, *rest = np.random.get_state()
        torch_states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self._device == "cuda" else [])]
        own = [pickle.dumps(_state(generator)) for generator in self._own_generators]
        return (random.getstate(), words.tobytes(), *rest, *(state.numpy().tobytes() for state in torch_states), *own)


def _draws(value: Any) -> bool:
    return isinstance(value, random.Random | np.random.Generator | np.random.RandomState | torch.Generator)


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state().tolist() if isinstance(generator, torch.Generator) else generator.get_state()
