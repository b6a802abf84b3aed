"""Training and evaluation mode of every module of a network, as `train(mode)` leaves them and as they were before."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from utils.seed import preserved_random_state


@contextmanager
def preserved_modes(*networks: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode that it had, and every parameter learns or not, as before."""
    modes = {module: module.training for network in networks for module in network.modules()}
    learns = {parameter: parameter.requires_grad for network in networks for parameter in network.parameters()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, own in learns.items():  # a network that freezes layers may do so in its `train`
            parameter.requires_grad_(own)


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """The networks in evaluation mode, and afterwards every module in the mode that it had."""
    with preserved_modes(*networks):
        for network in networks:
            network.eval()
        yield


@contextmanager
def without_trace(network: nn.Module) -> Iterator[None]:
    """Afterwards modes, `requires_grad`, buffers and every global random stream are as before, whatever ran in between."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    cuda_devices = {tensor.device.index for tensor in (*network.parameters(), *network.buffers()) if tensor.is_cuda}
    with preserved_random_state(), torch.random.fork_rng(devices=cuda_devices), preserved_modes(network):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


def deviating_modes(network: nn.Module, mode: bool) -> dict[str, bool]:
    """Names of the modules that `network.train(mode)` leaves in the other mode, with that mode. The network is as before."""
    with preserved_modes(network):
        network.train(mode)
        return {name: module.training for name, module in network.named_modules() if module.training is not mode}
