"""What criteria such as `filter-nggm` and `filter-taylor` score filters by: gradients of the loss over training batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from models.graph.layers import PrunableLayer
from models.graph.walk import Inputs
from utils.errors import ParameterError, UserError
from utils.modes import without_trace
from utils.training.objective import logits_of

Loss = Callable[[Any, Any], Tensor]  # of what a network gives and what it should


def mean_gradients(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, Any]],
    *,
    layers: Sequence[PrunableLayer],
    loss: Loss | None = None,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """Gradient of the mean `loss` over the images of `batches`, by layer name, in the shape of the weights, filters first.

    `batches` gives (images, labels) on the model's device, or inputs of any kind that `called` takes and what `loss(results,
    targets)`, a mean over the batch, compares with what the network gives: the cross-entropy of its logits. The gradients
    are summed batch by batch, each weighed by its images, in the memory of one training step. The pass runs in training
    mode, so it is the gradient that training is about to follow (batch statistics, dropout), and does not rest on running
    statistics that a fresh network has not got. It leaves no trace: buffers, torch's default random streams, `.grad`,
    `requires_grad` and the mode of every module are as before.

    Among several processes `all_reduce` adds a tensor up over them in place (`torch.distributed.all_reduce`); all of them
    then return the same. Raises UserError for no batch at all, or a gradient that is not finite.
    """
    weights = [layer.module.weight for layer in layers]
    sums = [torch.zeros_like(weight) for weight in weights]
    images_seen = 0
    with without_trace(model), torch.enable_grad():
        model.train()
        for weight in weights:
            weight.requires_grad_(True)
        for images, labels in batches:
            gradients, count = _batch_gradients(model, images, labels, weights=weights, loss=loss), batch_size(images)
            torch._foreach_add_(sums, gradients, alpha=count)
            images_seen += count
            del gradients  # or they would stay beside the next batch's activations
    if all_reduce is not None:
        images_seen = _reduce(sums, images_seen, all_reduce)
    if not images_seen:
        raise ParameterError("samp_batches", None, "not one training batch to take the gradient over: give 1 or more")
    torch._foreach_div_(sums, images_seen)
    _check_finite(layers, sums)
    return {layer.name: layer.filters_first(gradient) for layer, gradient in zip(layers, sums, strict=True)}


def _batch_gradients(
    model: nn.Module, images: Any, labels: Any, *, weights: list[Tensor], loss: Loss | None
) -> tuple[Tensor, ...]:
    results = called(model, images)
    value = F.cross_entropy(logits_of(results), labels) if loss is None else loss(results, labels)
    # Asked for these weights alone, autograd neither touches `.grad` nor computes what no criterion reads.
    return torch.autograd.grad(value, weights, materialize_grads=True)


def called(model: nn.Module, inputs: Inputs) -> Any:
    """What the network gives for inputs: a tensor, several in a tuple or list, or by name in a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def batch_size(inputs: Inputs) -> int:
    return len(next(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)))


def importances(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, Any]],
    *,
    layers: Sequence[PrunableLayer],
    of: str,
    loss: Loss | None = None,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """The sum over batches of `sum (v g)^2`, (F,) by layer name in float64, g the gradient of the batch's mean loss.

    Molchanov et al., CVPR 2019. v are a filter's own weights, or with `of="gates"` the factor 1 of its map behind the norm
    that reads it (behind the layer where there is none), so that `v g` is the sum over images and positions of `a dL/da`. The
    pass runs in evaluation: a batch norm that normalises by the batch would undo what is done to a filter's weights.

    The other arguments, and what is left as it was, are those of `mean_gradients`; among several processes the square is of the
    gradient of the whole batch.
    """
    sums = [torch.zeros(layer.filters, dtype=torch.float64, device=layer.module.weight.device) for layer in layers]
    batches_seen = 0
    with without_trace(model), _gates(layers if of == "gates" else ()) as gates, torch.enable_grad():
        model.eval()
        variables = gates or [layer.module.weight for layer in layers]
        for variable in variables:
            variable.requires_grad_(True)
        for images, labels in batches:
            gradients = _batch_gradients(model, images, labels, weights=variables, loss=loss)
            own = batch_size(images)
            gradients = [gradient * own for gradient in gradients]
            count = own if all_reduce is None else _reduce(gradients, own, all_reduce)
            for layer, total, variable, gradient in zip(layers, sums, variables, gradients, strict=True):
                squares = (variable.detach().double() * gradient / count).square()
                total += (squares if gates else layer.filters_first(squares)).flatten(1).sum(1)
            batches_seen += 1
    if not batches_seen:
        raise ParameterError("samp_batches", None, "not one training batch to take the gradient over: give 1 or more")
    _check_finite(layers, sums)
    return {layer.name: total for layer, total in zip(layers, sums, strict=True)}


@contextmanager
def _gates(layers: Sequence[PrunableLayer]) -> Iterator[list[Tensor]]:
    """Within it each filter's map is multiplied by a gate of its own, (F, 1), all of them 1."""
    gates, handles = [], []

    def gate_of(layer: PrunableLayer) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        gate = layer.module.weight.new_ones(layer.filters, 1)
        gates.append(gate)
        axis = -1 if layer.is_linear else 1
        return lambda module, inputs, maps: maps * gate.view([-1 if dim == axis % maps.dim() else 1 for dim in range(maps.dim())])

    try:
        for layer in layers:
            handles.append((layer.norm or layer.module).register_forward_hook(gate_of(layer)))
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _reduce(sums: list[Tensor], images_seen: int, all_reduce: Callable[[Tensor], object]) -> int:
    count = torch.tensor(images_seen, device=sums[0].device)
    for total in (*sums, count):
        all_reduce(total)
    return int(count)


def _check_finite(layers: Sequence[PrunableLayer], gradients: list[Tensor]) -> None:
    finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).tolist()
    if not all(finite):
        name = layers[finite.index(False)].name
        raise UserError(
            f"the gradient of {name} is NaN or infinite: check the network that is pruned, "
            "or choose a criterion without gradients, such as filter-gm"
        )
