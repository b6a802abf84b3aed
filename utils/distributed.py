"""Many processes, one training: what `torchrun` started, and plain single-process runs in the same form."""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError
from utils.world import World

TIMEOUT = timedelta(minutes=10)
PATIENCE = timedelta(days=1)
T = TypeVar("T")


def join(world: World, device: torch.device) -> None:
    """Joins the process group (NCCL on CUDA, gloo elsewhere). Raises UserError if it cannot form in time."""
    if world.size == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"torchrun: {world.size} processes could not form a group: {str(error).splitlines()[0]}") from error


def leave() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_process(error: RuntimeError) -> bool:
    """Whether `error` is that of a message between processes, as when one of them has ended."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def sum_over_processes(*tensors: Tensor) -> None:
    """Adds up each tensor over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def average_over_processes(tensors: Iterable[Tensor]) -> None:
    """Makes each tensor the mean of those of all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; a message between hosts, never with the accelerator."""
    if not dist.is_initialized():
        return flag
    vote = torch.tensor(int(flag))
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote)


def same_everywhere(values: Sequence[object]) -> list[object]:
    """The main process's values, in every process."""
    shared = list(values)
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    return shared


def from_main(compute: Callable[[], T]) -> T:
    """What `compute()` gives in the main process, in every process; the others wait for it however long it takes."""
    if not dist.is_initialized():
        return compute()
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    shared = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0, group=patient)
    dist.destroy_process_group(patient)
    return shared[0]


def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """The main process's values in every process, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
