"""What a run was made with: versions, commit, host. Recorded so that a result can be traced."""

import platform
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from utils.version import git_sha


def describe_environment() -> dict[str, Any]:
    """The command line, the commit, the host and the versions, as plain values."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_sha": git_sha(),
        "host": socket.gethostname(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
