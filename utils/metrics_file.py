"""metrics.jsonl: what a run recorded, a line an epoch and split."""

import contextlib
import json
from pathlib import Path
from typing import Any

from utils.run_folder import METRICS


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; a last line that was cut off by a crash is passed over."""
    path = folder / METRICS
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records
