"""What this is: its version, its commit and what it runs on, known without importing anything for it."""

import platform
import subprocess
from pathlib import Path

VERSION = "1.0.0"
REPOSITORY = Path(__file__).resolve().parents[1]
SHORT_SHA = 10


def git_sha() -> str | None:
    """The commit of this repository, with `+` behind it if tracked files were changed; None outside a checkout."""
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(REPOSITORY), *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")


def version_line(script: str) -> str:
    """`pruning.py 1.0.0, commit 0123456789, Python 3.11.7, torch 2.9.1`."""
    sha = git_sha()
    commit = f", commit {sha[:SHORT_SHA]}{'+' if sha.endswith('+') else ''}" if sha is not None else ""
    return f"{script} {VERSION}{commit}, Python {platform.python_version()}, {_installed('torch')}"


def _installed(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # takes as long as all the rest

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"
