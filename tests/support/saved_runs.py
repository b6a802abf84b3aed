"""Folders as the entry scripts leave them, without any training: the small files that a report reads."""

import json
from pathlib import Path
from typing import Any

COMMON_FLAGS = {"dataset": "digits", "lr": 0.01, "n_epochs": 4, "save_dir": "./saves", "device": "auto"}
PRUNING_FLAGS = {
    **{"t_model": "resnet20", "t_path": "elsewhere/teacher.pt", "distill": ["hap"], "alpha": 0.9, "betas": None, "hap_ts": 3},
    **{"prune_mode": "filter-nggm", "prune_rates": [0.6], "soft_prune": False, "gamma": 0.5, "samp_batches": None},
}
LAYERS = {"conv_1_3x3": (16, 10), "stage_1.0.conv_a": (16, 10), "stage_2.0.conv_a": (32, 19), "stage_3.0.conv_a": (64, 38)}
DENSE = {"parameters": 269722, "macs": 40551808, "file_bytes": 1_110_000}
ARCHIVE = {
    **{"file_bytes": 30_000, "uncoded_bytes": 6_000, "overhead_bytes": 500},
    "total": {"payload_bytes": 20_000, "coded_bytes": 23_500},
}
COMPACT = {"parameters": 100123, "macs": 17_600_000, "file_bytes": 430_000}


def write_run(
    folder: Path, *, script: str, top1: float, summary: dict[str, Any], best: float | None = None, **flags: Any
) -> Path:
    """A finished run; `flags` overrides and completes those that all scripts have."""
    flags = {"seed": 1, **COMMON_FLAGS, "run_name": folder.name, **flags}
    folder.mkdir(parents=True)
    config = {"script": script, "flags": flags, "device": "cpu, 2 threads", "processes": 1, "command": f"{script} --seed 1",
              "git_sha": "0123abc", "versions": {"torch": "2.14.1"}}  # fmt: skip
    head = {"script": script, "run": folder.name, "dataset": flags["dataset"], "seed": flags["seed"]}
    head |= {"seconds": 90.0, "training_flops": 2.5e15}
    ends = {"last": {"epoch": 3, "top1": top1}, "best": {"epoch": 2, "top1": top1 if best is None else best}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps({**head, **ends, **summary}))
    curve = [max(top1 - below, 0) for below in (40, 8, 1, 0)]
    lines = [
        {"epoch": epoch, "split": split, "top1": value, "seconds": 1.0}
        for epoch, value in enumerate(curve)
        for split in ("train", "test")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_unpruned(folder: Path, *, top1: float = 98.0, **flags: Any) -> Path:
    return write_run(
        folder,
        script="initial_train.py",
        top1=top1,
        summary={"parameters": DENSE["parameters"]},
        **{"model": "resnet20", **flags},
    )


def write_pruned(folder: Path, *, top1: float, teacher: float = 98.0, latency_ms: float = 40.0, **flags: Any) -> Path:
    summary = {
        "model": "resnet20",
        "teacher": {"top1": teacher},
        "kept_filters": {name: kept for name, (_, kept) in LAYERS.items()},
        "compact": {
            "dense": {**DENSE, "latency": {"64": {"median_ms": 60.0}}},
            "compact": {**COMPACT, "latency": {"64": {"median_ms": latency_ms}}},
        },
    }
    write_run(folder, script="pruning.py", top1=top1, summary=summary, **{**PRUNING_FLAGS, **flags})
    layers = {name: {"filters": filters, "kept": list(range(kept))} for name, (filters, kept) in LAYERS.items()}
    (folder / "kept_filters.json").write_text(json.dumps(layers))
    return folder


def write_quantized(folder: Path, *, top1: float, original: float = 96.0, **flags: Any) -> Path:
    summary = {
        "model": "resnet20",
        "accuracy": {"original": {"top1": original}, "decoded": {"top1": top1}},
        "compact": {"dense": {**DENSE}, "compact": {**COMPACT}},
        "archive": ARCHIVE,
    }
    flags = {"load_path": "gone/net.pt", "quan_mode": "all-quan", "quan_bits": ["5"], **flags}
    return write_run(folder, script="quantize_encode.py", top1=top1, summary=summary, **flags)
