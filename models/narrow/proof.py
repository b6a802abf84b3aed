"""Before a network trains through its graph: does that give what its own code gives, and the same gradients, on a few images?

A small network is compared with the masked one that it takes the place of, and `outputs(x).logits` with `forward(x)`. Both
run as copies in float64, where rounding cannot hide a difference and small batches do not magnify it: once in evaluation,
once in training, with the gradients of a sum over all that the networks give, weighted at random. Every gradient of the
masked network is compared, those that the small network has no place for as well, and what the step did to the running
statistics. Nothing of the networks changes, and no random stream.

Both begin with the same random numbers. Dropout and randomized activations would give a small network others, since the shapes
differ; they are switched off. What drops whole images (stochastic depth) draws the same ones in both.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.copies import copied
from models.difference import tensors_in
from models.narrow import NarrowNetwork
from models.outputs import has_outputs, outputs_run_graph
from utils.errors import UserError
from utils.modes import preserved_modes
from utils.seed import preserved_random_state, seed_everything
from utils.training.objective import logits_of

IMAGES = 4
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}  # of the largest number in a tensor
NOISE = 1e-4  # of the largest number in all tensors of a kind; less is rounding: a bias before a batch norm has no gradient

Pairs = Iterator[tuple[str, Tensor, Tensor]]  # name, what the masked network has, what the small one has


def check_equal_training(masked: nn.Module, small: NarrowNetwork, images: Tensor, *, pruned: Mapping[str, Tensor]) -> None:
    """Raises UserError, with what differs and by how much, unless `small` evaluates and trains as `masked` does.

    `images` (N, C, H, W) are on the networks' device; the first few are used. `pruned` says which rows of which tensors of
    `masked` are held at 0, whatever their gradient.
    """
    images = images[:IMAGES]
    methods = ("forward", "outputs") if has_outputs(masked, images) else ("forward",)
    with preserved_modes(small):
        small.train()  # one that can only be evaluated says so
    if "outputs" in methods:
        check_outputs(masked, images)
    with preserved_random_state():
        dtype = torch.float64 if _computes_in(masked, images, torch.float64) else torch.float32
        twins = [copied(network).to(dtype).eval() for network in (masked, small)]
        with torch.no_grad():
            results = [_run(twin, images.to(dtype), methods, "in evaluation") for twin in twins]
        _check(_results(*results, "in evaluation"), "{} differs in evaluation", TOLERANCES[dtype])
        results = [_step(twin.train(), images.to(dtype), methods, "in training") for twin in twins]
        _check(_results(*results, "in training"), "{} differs in training", TOLERANCES[dtype])
        _check(_gradients(*twins, pruned), "the gradient of {} differs", TOLERANCES[dtype])
        _check(_buffers(*twins), "{} differs after a step", TOLERANCES[dtype])


def check_outputs(network: nn.Module, images: Tensor) -> None:
    """Raises UserError unless `network.outputs(x)` gives in training the logits of `network(x)`, with their gradients.

    `images` (N, C, H, W) are on the network's device; the first few are used. Where `outputs` is the network's own method
    there is nothing to check.
    """
    if not outputs_run_graph(network):
        return
    images = images[:IMAGES]
    with preserved_random_state():
        dtype = torch.float64 if _computes_in(network, images, torch.float64) else torch.float32
        own, other = (copied(network).to(dtype).train() for _ in range(2))
        with torch.enable_grad():
            expected = _learn(own, lambda: logits_of(own(images.to(dtype))))
            found = _learn(other, lambda: other.outputs(images.to(dtype)).logits)
    name = type(network).__name__
    _check([("", expected, found)], f"{name}: outputs(x).logits{{}} differs from its forward pass in training", TOLERANCES[dtype])
    parameters = _pairs_of(own.named_parameters(), other.named_parameters(), lambda parameter: _gradient(parameter))
    _check(parameters, f"{name}: the gradient of {{}} by outputs(x) differs from that by its forward pass", TOLERANCES[dtype])
    buffers = _pairs_of(own.named_buffers(), other.named_buffers(), lambda buffer: buffer.double())
    _check(buffers, f"{name}: {{}} differs after outputs(x) from what it is after a forward pass", TOLERANCES[dtype])


def _learn(network: nn.Module, logits: Callable[[], Tensor]) -> Tensor:
    """The logits, whose gradients are left in the network."""
    network.zero_grad()
    seed_everything(0)
    result = logits()
    if result.requires_grad:
        _weighted_sum(result).backward()
    return result.detach()


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _pairs_of(own: Iterable[tuple[str, Tensor]], other: Iterable[tuple[str, Tensor]], of: Callable[[Tensor], Tensor]) -> Pairs:
    for (name, expected), (_, found) in zip(own, other, strict=True):
        yield name, of(expected), of(found)


def pruned_rows(network: nn.Module, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The rows of weights and biases that are 0 in `network` where layers give only the channels `kept`, by key."""
    rows: dict[str, Tensor] = {}
    for name, channels in kept.items():
        for key, parameter in network.get_submodule(name).named_parameters(prefix=name, recurse=False):
            gone = torch.ones(len(parameter), dtype=torch.bool)
            gone[list(channels)] = False
            rows[key] = gone.nonzero().flatten()
    return rows


def _computes_in(network: nn.Module, images: Tensor, dtype: torch.dtype) -> bool:
    """Whether the network runs in that precision: one with casts of its own may not."""
    try:
        with torch.no_grad():
            copied(network).to(dtype).eval()(images.to(dtype))
    except RuntimeError:
        return False
    return True


def _run(network: nn.Module, images: Tensor, methods: tuple[str, ...], where: str) -> list[Tensor]:
    """All tensors that the network gives."""
    results: list[Tensor] = []
    with _failures_named(network, where), _WithoutDropout():
        for method in methods:
            seed_everything(0)
            results += [tensor for _, tensor in tensors_in(getattr(network, method)(images))]
    return results


def _step(network: nn.Module, images: Tensor, methods: tuple[str, ...], where: str) -> list[Tensor]:
    """As `_run`; leaves its gradients and the statistics of a step in the network."""
    network.zero_grad()
    results = _run(network, images, methods, where)
    with _failures_named(network, where):
        learning = [_weighted_sum(result) for result in results if result.requires_grad]
        if learning:
            torch.stack(learning).sum().backward()
    return [result.detach() for result in results]


@contextmanager
def _failures_named(network: nn.Module, where: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        role = "small" if isinstance(network, NarrowNetwork) else "masked"
        raise UserError(f"the {role} network fails {where}: {str(error).strip().splitlines()[0]}") from error


def _weighted_sum(result: Tensor) -> Tensor:
    """Random weights show a gradient for every entry, which a sum of squares or a cross entropy may not."""
    generator = torch.Generator().manual_seed(result.numel())
    weights = torch.rand(result.shape, dtype=torch.float64, generator=generator) - 0.4
    return (result * weights.to(result)).sum()


class _WithoutDropout(TorchFunctionMode):
    """Functions that draw a random number for every channel or entry act as in evaluation."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _RANDOM:
            call = _RANDOM[function].bind(*args, **kwargs)
            args, kwargs = call.args, {**call.kwargs, "training": False}
            args = args[: list(call.signature.parameters).index("training")]
        return function(*args, **kwargs)


_RANDOM = {
    function: inspect.signature(function)
    for function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu)
}


def _results(expected: list[Tensor], found: list[Tensor], where: str) -> Pairs:
    shapes = [[tuple(result.shape) for result in results] for results in (expected, found)]
    if shapes[0] != shapes[1]:
        raise UserError(f"the small network gives results of the shapes {shapes[1]} {where}, the masked one {shapes[0]}")
    for place, pair in enumerate(zip(expected, found, strict=True), start=1):
        yield f"result {place} of {len(expected)}", *pair


def _gradients(masked: nn.Module, small: NarrowNetwork, pruned: Mapping[str, Tensor]) -> Pairs:
    """In the shapes of the masked network; a gradient that there is not is 0, and so is that of a pruned row."""
    for key, parameter in masked.named_parameters(remove_duplicate=False):
        stored = small.stored(key)
        gradient = _gradient(parameter).clone()
        own = small.widened(key, None if stored is None else stored[0].grad).to(gradient, copy=True)
        for each in (gradient, own) if key in pruned else ():
            each.index_fill_(small.output_axis(key), pruned[key].to(each.device), 0)
        yield key, gradient, own


def _buffers(masked: nn.Module, small: NarrowNetwork) -> Pairs:
    """Those of which the small network has anything, where it has it."""
    for key, buffer in masked.named_buffers(remove_duplicate=False):
        stored = small.stored(key)
        if stored is not None:
            there = small.widened(key, torch.ones_like(stored[0])).bool()
            yield key, buffer[there].double(), small.widened(key, stored[0])[there].double()


def _check(pairs: Iterable[tuple[str, Tensor, Tensor]], message: str, tolerance: float) -> None:
    pairs = list(pairs)
    floor = NOISE * max((float(expected.abs().max()) for _, expected, _ in pairs if expected.numel()), default=0.0)
    for name, expected, found in pairs:
        if expected.numel():
            difference, largest = float((expected - found).abs().max()), max(float(expected.abs().max()), floor)
            if not difference <= tolerance * largest:  # a NaN is no agreement either
                relative = difference / largest if largest else difference
                raise UserError(f"{message.format(name)} by {relative:.1e} of its largest number (limit {tolerance})")
