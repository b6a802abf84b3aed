"""Where tensors live: the device of a process, and networks on it."""

import torch
from torch import nn

from utils.errors import ParameterError
from utils.world import World


def choose_device(name: str, index: int | None, world: World) -> torch.device:
    """The device of this process. Raises ParameterError for a CUDA device that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0 and index is None):
        return torch.device("cpu")
    asked = ("dev_idx", index) if index is not None else ("device", name)
    if count == 0:
        raise ParameterError(*asked, "no CUDA device was found here; choose the CPU")
    index = (index or 0) + world.local_rank
    if index >= count:
        raise ParameterError(*asked, f"there is no CUDA device {index}, found {count} (0 to {count - 1})")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """What a person calls it, on a CPU with the threads that are used."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def to_device(network: nn.Module, device: torch.device, *, sync_bn: bool = False) -> nn.Module:
    """The network on `device` in channels-last layout, the faster one for convolutions on CPUs and on tensor cores."""
    if sync_bn:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network.to(device, memory_format=torch.channels_last)
