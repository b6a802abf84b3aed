"""The gradient that criteria such as `filter-nggm` score filters by: of the mean cross-entropy over training batches."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune.masks import PrunableLayer
from utils.errors import UserError
from utils.modes import without_trace
from utils.training.objective import logits_of


def mean_gradients(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    layers: Sequence[PrunableLayer],
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    training: bool = True,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """Gradient of the mean `loss` over the images of `batches`, by layer name, in the shape of the conv weights.

    `batches` gives (images, labels) on the model's device; `loss(logits, labels)` is a mean over the batch. The gradients
    are summed batch by batch, each weighed by its images, in the memory of one training step. The pass runs in training
    mode, so it is the gradient that training is about to follow (batch statistics, dropout), and does not rest on running
    statistics that a fresh network has not got; without `training` it is that of the network as it is evaluated. It leaves no
    trace: buffers, torch's default random streams, `.grad`, `requires_grad` and the mode of every module are as before.

    Among several processes `all_reduce` adds a tensor up over them in place (`torch.distributed.all_reduce`); all of them
    then return the same. Raises UserError for no batch at all, or a gradient that is not finite.
    """
    weights = [layer.module.weight for layer in layers]
    sums = [torch.zeros_like(weight) for weight in weights]
    images_seen = 0
    with without_trace(model), torch.enable_grad():
        model.train(training)
        for weight in weights:
            weight.requires_grad_(True)
        for images, labels in batches:
            gradients = _batch_gradients(model, images, labels, weights=weights, loss=loss)
            torch._foreach_add_(sums, gradients, alpha=len(images))
            images_seen += len(images)
            del gradients  # or they would stay beside the next batch's activations
    if all_reduce is not None:
        images_seen = _reduce(sums, images_seen, all_reduce)
    if not images_seen:
        raise UserError("--samp-batches: not one training batch to take the gradient over: give 1 or more")
    torch._foreach_div_(sums, images_seen)
    _check_finite(layers, sums)
    return {layer.name: gradient for layer, gradient in zip(layers, sums, strict=True)}


def _batch_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, *, weights: list[Tensor], loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, ...]:
    # Asked for these weights alone, autograd neither touches `.grad` nor computes what no criterion reads.
    return torch.autograd.grad(loss(logits_of(model(images)), labels), weights, materialize_grads=True)


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
            f"the gradient of {name} is NaN or infinite: check the network that is pruned (--t-path, --s-path), "
            "or choose a --prune-mode without gradients, such as filter-gm"
        )
