"""Which of the processes that `torchrun` started this is; a single process is a world of one."""

import os
from dataclasses import dataclass

from utils.errors import UserError

_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


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
