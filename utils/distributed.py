"""Many processes, one training: what `torchrun` started, and plain single-process runs in the same form."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError

TIMEOUT = timedelta(minutes=10)
PATIENCE = timedelta(days=1)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which process this is: `rank` of `size`, `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def launch_flags(self) -> list[str]:
        """What torchrun was told of the number of processes."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        return [*([f"--nnodes={self.size // here}"] if here < self.size else []), f"--nproc_per_node={here}"]

    def share(self, length: int) -> slice:
        """This process's part of `length` items; the parts of all processes are disjoint and cover everything."""
        return slice(length * self.rank // self.size, length * (self.rank + 1) // self.size)


def world_from_environment() -> World:
    """What torchrun says in the environment; a world of one without it. Raises UserError where that is not a number."""
    try:
        rank, size, local_rank = (int(os.environ.get(key, default)) for key, default in _ENVIRONMENT)
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK are set by torchrun and must be whole numbers: {error}") from error
    return World(rank, size, local_rank)


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


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
