"""What the shell scripts ask of the registries: `python3 -m scripts.methods` prints it, a line each, in a tenth of a second.

criterion_flags NAME FLAG...   the flags that a criterion reads, of those that not all of them do
criterion_inputs NAME INPUT... what it asks for beside the weights (prune/criteria.py)
loss_flags NAME FLAG...        the flags that a loss reads, and KD beside it, of those that not all losses do
loss_beta NAME BETA            the usual weight of a loss that has one (distill/registry.py)
loss_beside_kd NAME            a loss beside which KD is trained by as well, or KD itself
shared_flags FLAG...           the flags that all three training scripts have, but for those that a script sets itself
datasets NAME...               the sets of images
"""

from distill.registry import DISTILLERS, default_alpha, flags_read
from prune.criteria import CRITERIA
from prune.flags import criterion_flags
from utils import cli
from utils.images.settings import DATASET_NAMES

SET_BY_SCRIPTS = frozenset(("dataset", "seed", "save_dir", "run_name", "resume", "auto_resume", "dry_run", "evaluate"))


def lines() -> list[str]:
    """The lines that are printed."""
    found = []
    for name, criterion in CRITERIA.items():
        found.append(_line("criterion_flags", name, *map(cli.flag_of, criterion_flags(name))))
        found.append(_line("criterion_inputs", name, *sorted(criterion.inputs)))
    for name, entry in DISTILLERS.items():
        found.append(_line("loss_flags", name, *map(cli.flag_of, flags_read([name]))))
        if entry.beta is not None:
            found.append(_line("loss_beta", name, f"{entry.beta:g}"))
        if default_alpha([name]) > 0:
            found.append(_line("loss_beside_kd", name))
    return [*found, _line("shared_flags", *map(cli.flag_of, shared_flags())), _line("datasets", *DATASET_NAMES)]


def shared_flags() -> list[str]:
    parser = cli.Parser(prog="shared")
    cli.add_data_flags(parser)
    cli.add_training_flags(parser, lr=1.0, n_epochs=1, schedule=(), lr_drops=())
    cli.add_run_flags(parser, log_name="")
    return sorted(parser.names() - SET_BY_SCRIPTS)


def _line(*words: str) -> str:
    return " ".join(words)


if __name__ == "__main__":
    print("\n".join(lines()))
