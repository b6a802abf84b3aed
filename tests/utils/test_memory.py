"""Freed memory stays with the process: its address space does not shrink when tensors go."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import resource, sys
from pathlib import Path
import torch
from utils.memory import keep_freed_memory

def size():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() / 2**20

if sys.argv[1] == "keep":
    keep_freed_memory()
sizes = [size()]
for _ in range(10):
    tensors = [torch.ones(4 << 20) for _ in range(4)]  # 16 MiB each
    sizes.append(size())
    del tensors
    sizes.append(size())
print(*(later - sizes[0] for later in sizes[1:]))
"""


def sizes_mib(word: str) -> tuple[list[float], list[float]]:
    """How much larger the process is than at first, with four tensors and when they have gone, ten times."""
    command = [sys.executable, "-c", PROGRAM, word]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = [float(number) for number in printed.split()]
    return sizes[::2], sizes[1::2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_kept_and_used_again():
    with_tensors, without = sizes_mib("keep")
    assert without == with_tensors
    assert with_tensors[-1] == with_tensors[-5]
    with_tensors, without = sizes_mib("default")
    assert without[0] < with_tensors[0] - 32  # of the 64 MiB
