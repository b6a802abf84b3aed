"""A page as headless Chromium shows it."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def browse(page: Path, profile: Path, *, fragment: str = "", width: int = 1400) -> tuple[str, list[str]]:
    """The document after its script ran, `width` pixels wide, and what the console said."""
    place = [f"--user-data-dir={profile}", f"--window-size={width},1000"]
    command = [CHROMIUM, *FLAGS, *place, "--dump-dom", f"{page.as_uri()}{fragment}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]
