"""Where a run is computed and what it leaves behind, without anything that has to be imported for it."""

from dataclasses import dataclass

# where a run is computed, not what is computed: may differ when it is resumed
PLACEMENT_FLAGS = frozenset(("resume", "dry_run", "data_dir", "accept_data", "device", "dev_idx", "workers"))

# files that may lie elsewhere when it is resumed: what they hold is proved by a digest
MOVABLE_FLAGS = frozenset(("t_path", "s_path", "load_path"))


@dataclass(frozen=True)
class RunSettings:
    """A new run in `save_dir`, or with `resume` the one in that folder; `dry_run` and `evaluate` leave nothing behind."""

    seed: int = 1
    save_dir: str = "./saves"
    run_name: str | None = None
    log_name: str = "log.txt"
    device: str = "auto"
    dev_idx: int | None = None
    amp: bool = False
    compile: bool = False
    sync_bn: bool = False
    resume: str | None = None
    checkpoint_interval: int = 1
    checkpoint_minutes: float | None = None
    dry_run: bool = False
    evaluate: bool = False
