"""Statistics of batch norm that belong to the weights as they are, and not to those of the steps before.

The running statistics of training follow the weights slowly. Where the weights change all at once, as when filters are
cleared, the layers behind go on with the statistics of another network until they are estimated anew.
"""

import contextlib
from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn

from utils.distributed import average_over_processes
from utils.errors import ParameterError
from utils.images.batches import ImageData
from utils.seed import preserved_random_state
from utils.training.metrics import is_at_chance

BatchNorm = nn.modules.batchnorm._BatchNorm


def check_recalibration(network: nn.Module, batches: int | None) -> None:
    """Raises ParameterError if `batches` are given for a network that has no running statistics."""
    if batches is not None and not _norms_of(network):
        raise ParameterError("batches", batches, "this network has no batch norm with running statistics; leave it out")


def lags_behind(network: nn.Module, *, train_top1: float, test_top1: float, num_classes: int) -> bool:
    """Whether the accuracies (%) of an epoch look like those of running statistics that are not the weights' yet.

    What was trained on is known well above chance, what is tested with these statistics is not.
    """
    chance = 100 / num_classes
    is_stuck = is_at_chance(test_top1, num_classes=num_classes)
    return bool(_norms_of(network)) and is_stuck and train_top1 - chance >= (100 - chance) / 4


@contextlib.contextmanager
def recalibrated_batch_norm(network: nn.Module, data: ImageData, *, batches: int | None, amp: bool = False) -> Iterator[None]:
    """Within it the running statistics are means over `batches` training batches; afterwards every bit is as before.

    Each batch counts the same, in all processes together; they are the same batches every time, none of them is learnt from,
    and an epoch has no more of them than it has. Without `batches` nothing happens. Everything but batch norm computes as in
    evaluation, so no dropout is drawn.
    """
    if batches is None:
        yield
        return
    norms = _norms_of(network)
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    saved = [buffer.clone() for buffer in buffers]
    try:
        _estimate(network, norms, data, batches=batches, amp=amp)
        yield
    finally:
        for buffer, before in zip(buffers, saved, strict=True):
            buffer.copy_(before)


def _norms_of(network: nn.Module) -> list[BatchNorm]:
    return [module for module in network.modules() if isinstance(module, BatchNorm) and module.running_mean is not None]


@torch.no_grad()
def _estimate(network: nn.Module, norms: list[BatchNorm], data: ImageData, *, batches: int, amp: bool) -> None:
    modes = [(module, module.training) for module in network.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    network.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        with preserved_random_state(), torch.autocast(data.device.type, torch.bfloat16, enabled=amp):
            for seen, batch in enumerate(islice(data.train_batches("batch norm"), batches)):
                for norm in norms:
                    norm.momentum = 1 / (seen + 1)  # the mean of all batches so far; None is not known to every batch norm
                network(batch.images)
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in momenta:
            norm.momentum = momentum
    average_over_processes(statistic for norm in norms for statistic in (norm.running_mean, norm.running_var))
