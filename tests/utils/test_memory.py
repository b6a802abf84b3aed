"""Freed memory stays with the process: tensors that come and go cause no page faults."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import resource, sys
import torch
from utils.memory import keep_freed_memory

def rounds(count):
    for _ in range(count):
        tensors = [torch.ones(4 << 20) for _ in range(4)]  # 16 MiB each

if sys.argv[1] == "keep":
    keep_freed_memory()
rounds(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
rounds(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(word):
    command = [sys.executable, "-c", PROGRAM, word]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_used_again():
    assert page_faults("keep") < 0.2 * page_faults("default")
