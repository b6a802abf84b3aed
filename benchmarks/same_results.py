"""Runs the same command lines in two checkouts and compares, bit for bit, what they leave.

    git worktree add ../before v1.0.0
    python3 benchmarks/same_results.py ../before . --keep ../before_results

Each checkout has one warm process, which forks another for every command. A command that begins with the files of an earlier
one gets those of OLD in both checkouts: so a difference stays with the command it belongs to, and NEW has to read what OLD
wrote. Runs marked with `resumed` are also killed in OLD at their first saved state and resumed in NEW.

What OLD leaves stays in `--keep` and is made once for a commit. Times, versions, flags that OLD did not have and the state that
a run resumes from are not compared. Exit status 1 if a result differs and its command does not say why.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RUN, BEST, COMPACT, ARCHIVE = "saves/run", "saves/run/model_best.pt", "saves/run/model_compact.pt", "saves/run/model.huff"
PACKAGES = ("models", "prune", "distill", "quantize", "deploy", "utils")
RESNET, TRANSFORMER = (f"{Path(__file__).resolve().parent / 'small_networks.py'}:{name}" for name in ("resnet", "transformer"))
RISES = "weights rise from step to step, over an epoch at least"
SAYS_MORE = "says how many of the test images --limit-batches leaves"
NOT_COMPARED = re.compile(r"\.txt$|/log/|/lock$|/lease-|model_previous\.pt$|latency_table\.json$")
VARYING = re.compile(
    r"seconds|per_second|latency|git_sha|version|python|torch|hits|host|started|checkpoint_bytes|file_bytes|digest|ratio|measured"
)
TIMES = re.compile(r"[\d.,]+ (ms|s|images/s)\b")
SAME, DIFFERENT, SHOWN_DIFFERENCES = "same", "different", 3
ENDED = "ended.json"  # in the folder of a command: its words, and the status that it ended with

TRAINING = "--run-name run --n-epochs 2 --limit-batches 2 --batch-size 16 --schedule 1 --lr-drops 0.5 --device cpu"
LARGE = f"--t-path @train/{BEST} --s-copy-t --train-form compact {TRAINING}"
SMALL = f"--t-path @train-small/{BEST} --t-model {RESNET} --s-model {RESNET} --s-copy-t {TRAINING}"
MASKED, NARROW = f"{SMALL} --train-form masked", f"{SMALL} --train-form compact"
CODED = "--run-name run --n-epochs 1 --limit-batches 2 --batch-size 16 --device cpu --load-path"
EVALUATED = "--limit-batches 2 --device cpu --evaluate"
NAMED = "@images --top 3 --output classes.csv --load-path"


class Case(NamedTuple):
    """A command line. `@NAME/PATH` in its flags is a file that OLD's command of that name left.

    `intended` says why its results differ from those of commits before a change that was meant to alter them.
    """

    name: str
    script: str
    flags: str
    resumed: bool = False
    intended: str | None = None

    def words(self, old: Path) -> list[str]:
        return [str(old / word[1:]) if word.startswith("@") else word for word in self.flags.split()]

    def own_networks(self) -> list[str]:
        """The flags that a resumed run needs again, because their code never runs on a file's word."""
        words = self.flags.split()
        return [word for flag, value in pairwise(words) if value in (RESNET, TRANSFORMER) for word in (flag, value)]


CASES = (
    Case("train", "initial_train", f"--model resnet20 --lr 0.05 {TRAINING}"),
    Case("train-small", "initial_train", f"--model {RESNET} --ema 0.9 --label-smoothing 0.1 {TRAINING}", resumed=True),
    Case(
        "train-cosine",
        "initial_train",
        f"--model {RESNET} --lr-schedule cosine --warmup-epochs 1 --crop-padding 2 "
        "--run-name run --n-epochs 2 --limit-batches 2 --batch-size 16 --device cpu",
    ),
    Case("uniform-nggm-hap", "pruning", f"{LARGE} --prune-rates 0.6 --samp-batches 2 --distill hap", resumed=True),
    Case("coupled-macs", "pruning", f"{LARGE} --prune-mode filter-l2 --couple-channels --budget macs=0.5 --allocation global"),
    Case("l1-masked-at", "pruning", f"{MASKED} --prune-mode filter-a --prune-rates 0.6 --distill at"),
    Case("l1-compact-at", "pruning", f"{NARROW} --prune-mode filter-a --prune-rates 0.6 --distill at"),
    Case("fpgm-sp", "pruning", f"{NARROW} --prune-mode filter-gm --prune-rates 0.5 --distill sp"),
    Case("fpgm-squared", "pruning", f"{NARROW} --prune-mode filter-gm --gm-distance sqeuclidean --prune-rates 0.5"),
    Case("random-afd", "pruning", f"{NARROW} --prune-mode filter-r --prune-rates 0.7 --distill afd", resumed=True),
    Case(
        "bn-reviewkd",
        "pruning",
        f"{NARROW} --prune-mode filter-bn --prune-rates 0.6 --distill reviewkd --exclude-layers blocks.*.shortcut",
        intended=RISES,
    ),
    Case(
        "taylor-kd",
        "pruning",
        f"{NARROW} --prune-mode filter-taylor --samp-batches 2 --prune-rates 0.6 --distill kd --kd-standardize",
        intended="filter-taylor is the published gate, squared batch by batch",
    ),
    Case(
        "hrank-dkd",
        "pruning",
        f"{NARROW} --prune-mode filter-hrank --samp-batches 2 --prune-rates 0.6 --distill dkd",
        intended=RISES,
    ),
    Case(
        "chip-dist",
        "pruning",
        f"{NARROW} --prune-mode filter-chip --samp-batches 2 --prune-rates 0.6 --distill dist",
        intended="DIST adds its epsilon to the product of the lengths, as its official code does",
    ),
    Case("two-losses", "pruning", f"{NARROW} --prune-mode filter-a --prune-rates 0.8 --distill hap at --betas 700 1000"),
    Case("excluded", "pruning", f"{NARROW} --prune-mode filter-a --prune-rates 0.5 --exclude-layers blocks.0.* stem"),
    Case("coupled-params", "pruning", f"{NARROW} --prune-mode filter-a --couple-channels --budget params=0.6"),
    Case("multiple-of-8", "pruning", f"{NARROW} --prune-mode filter-l2 --prune-rates 0.6 --channel-multiple 8"),
    Case("global-macs", "pruning", f"{NARROW} --prune-mode filter-nggm --samp-batches 2 --budget macs=0.6 --allocation global"),
    Case(
        "time-measured",
        "pruning",
        f"{NARROW} --prune-mode filter-l2 --budget latency=0.8 --allocation global",
        intended="its times are measured anew",
    ),
    Case(
        "time",
        "pruning",
        f"{NARROW} --prune-mode filter-l2 --budget latency=0.8 --allocation global --budget-table "
        f"@time-measured/{RUN}/latency_table.json",
    ),
    Case("gradual-compact", "pruning", f"{NARROW} --prune-mode filter-gm --prune-rates 0.4 --prune-steps 2", resumed=True),
    Case("gradual-masked", "pruning", f"{MASKED} --prune-mode filter-gm --prune-rates 0.4 --prune-steps 2 --distill hap"),
    Case("soft", "pruning", f"{SMALL} --prune-mode filter-l2 --prune-rates 0.6 --soft-prune --distill hap", resumed=True),
    Case(
        "soft-recalibrated",
        "pruning",
        f"{SMALL} --prune-mode filter-gm --prune-rates 0.6 --soft-prune --prune-interval 2 --recalibrate-bn 2",
    ),
    Case(
        "linear",
        "pruning",
        f"--s-model {TRANSFORMER} --prune-linear --prune-mode filter-a --prune-rates 0.5 --train-form compact {TRAINING}",
    ),
    Case(
        "mobilenet",
        "pruning",
        "--s-model torchvision/mobilenet_v3_small --couple-channels --prune-mode filter-a "
        "--budget params=0.6 --allocation global --train-form compact --run-name run --n-epochs 1 --limit-batches 1 "
        "--batch-size 8 --device cpu",
    ),
    Case("fine-tuned", "initial_train", f"--load-path @uniform-nggm-hap/{BEST} {TRAINING}"),
    Case(
        "sensitivity",
        "pruning",
        f"--s-path @train-small/{BEST} --s-model {RESNET} --prune-mode filter-a --limit-batches 1 "
        "--batch-size 16 --device cpu --sensitivity sensitivity.json",
    ),
    Case("coded-dense", "quantize_encode", f"{CODED} @train/{BEST}"),
    Case("coded-pruned", "quantize_encode", f"{CODED} @uniform-nggm-hap/{BEST} --quan-mode conv --quan-bits 4", resumed=True),
    Case("coded-compact", "quantize_encode", f"{CODED} @coupled-macs/{COMPACT} --quan-bits 3 classifier=6"),
    Case("int8", "quantize_encode", f"{CODED} @uniform-nggm-hap/{BEST} --quan-mode int8 --t-path @train/{BEST} --distill hap"),
    Case("evaluate-dense", "initial_train", f"{EVALUATED} --load-path @train/{BEST}", intended=SAYS_MORE),
    Case("evaluate-pruned", "pruning", f"{EVALUATED} --s-path @uniform-nggm-hap/{BEST}", intended=SAYS_MORE),
    Case("evaluate-compact", "pruning", f"{EVALUATED} --t-path @coupled-macs/{COMPACT}", intended=SAYS_MORE),
    Case("evaluate-archive", "quantize_encode", f"{EVALUATED} --load-path @coded-pruned/{ARCHIVE}", intended=SAYS_MORE),
    Case("inspect", "quantize_encode", f"--inspect @coded-dense/{ARCHIVE}"),
    Case("decode", "quantize_encode", f"--decode @coded-compact/{ARCHIVE} --output decoded.pt"),
    Case(
        "export-python",
        "export",
        f"--load-path @coupled-macs/{COMPACT} --format python --output network.py --limit-batches 1",
        intended=SAYS_MORE,
    ),
    Case(
        "export-onnx",
        "export",
        f"--load-path @uniform-nggm-hap/{BEST} --output network.onnx --limit-batches 1",
        intended=SAYS_MORE,
    ),
    Case("predict-checkpoint", "predict", f"{NAMED} @uniform-nggm-hap/{BEST} --device cpu"),
    Case("predict-archive", "predict", f"{NAMED} @coded-dense/{ARCHIVE} --device cpu"),
    Case("predict-onnx", "predict", f"{NAMED} @export-onnx/network.onnx"),
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="same_results.py", description="Compare what two checkouts compute.")
    parser.add_argument("old", type=_checkout, metavar="OLD", help="the checkout whose results are expected")
    parser.add_argument("new", type=_checkout, metavar="NEW", help="the checkout that is compared with it")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for the results (default: a temporary one)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=[case.name for case in CASES], help="commands to compare (default: all)"
    )
    return parser


def _checkout(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "pruning.py").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a checkout of this repository, there is no pruning.py")
    return path


def main(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        keep = (args.keep or Path(temporary)).resolve()
        old, new = keep / "old" / commit_of(args.old), keep / "new"
        shutil.rmtree(new, ignore_errors=True)
        write_images(old / "images")
        chosen = [case for case in CASES if args.only is None or case.name in args.only]
        failed = in_checkout(args.old, lambda: make_expected(old))
        return failed or in_checkout(args.new, lambda: compare(chosen, old=old, new=new))


def commit_of(checkout: Path) -> str:
    """The commit of a checkout; one with changes of its own gets a name that no other call finds again."""
    described = subprocess.run(
        ["git", "-C", checkout, "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    return f"{described}-{time.time_ns()}" if described.endswith("-dirty") else described


def write_images(folder: Path) -> None:
    """Three images of random pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / name)


def in_checkout(checkout: Path, work: Callable[[], int | None]) -> int:
    """Does `work` in a process that has imported this checkout's packages; gives what it returns, 1 if it fails."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _leave_after(lambda: _import_all(checkout) or work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _import_all(checkout: Path) -> None:
    sys.path[0] = str(checkout)
    torch.set_num_threads(1)
    torch.ones(1, requires_grad=True).sum().backward()  # after tensors without data it would start threads
    for package in map(importlib.import_module, PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    for module in list(sys.modules.values()):  # no time is compared
        if hasattr(module, "MIN_RUN_SECONDS"):
            module.MIN_RUN_SECONDS, module.MIN_ROUNDS = 0.0, 2


def _leave_after(work: Callable[[], int | None]) -> NoReturn:
    """Ends a forked process with what `work` returns, or with status 1 if it fails."""
    status: Any = 1
    try:
        status = work() or 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # nobody else would hear of it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def make_expected(old: Path) -> None:
    for case in CASES:
        run(case.script, case.words(old), old / case.name)
        if case.resumed:
            run(case.script, case.words(old), stopped_folder(old, case), stop=True)


def stopped_folder(old: Path, case: Case) -> Path:
    return old / f"{case.name}-stopped"


def compare(cases: Sequence[Case], *, old: Path, new: Path) -> int:
    """Runs the commands in NEW and prints a row for each; 1 if results differ that should not."""
    unexpected = 0
    for case in cases:
        run(case.script, case.words(old), new / case.name)
        verdicts = {case.name: compared(old / case.name, new / case.name)}
        if case.resumed:
            begun = new / f"{case.name}-stopped"
            shutil.copytree(stopped_folder(old, case), begun)
            run(case.script, ["--resume", RUN, *case.own_networks()], begun)
            verdicts[f"{case.name}, begun in OLD"] = compared(old / case.name, begun)
        for title, verdict in verdicts.items():
            is_intended = case.intended is not None and verdict.startswith(DIFFERENT)
            print(f"{title:34} {verdict}{f' (intended: {case.intended})' if is_intended else ''}", flush=True)
            unexpected += verdict != SAME and not is_intended
    print(f"{unexpected} unexpected differences")
    return int(unexpected > 0)


def run(script: str, words: Sequence[str], folder: Path, *, stop: bool = False) -> None:
    """Runs an entry script in `folder`, unless that has been done; its output and status stay there.

    `stop` kills it when it has saved a state for the first time.
    """
    ended = folder / ENDED
    if ended.exists() and _has_ended(json.loads(ended.read_text()), words):
        return
    if "--resume" not in words:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        _leave_after(lambda: _execute(script, words, folder, stop=stop))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ended.write_text(json.dumps({"status": status, "words": list(words)}))


def _has_ended(record: Mapping[str, Any], words: Sequence[str]) -> bool:
    return record["words"] == list(words) and record["status"] in (0, -signal.SIGKILL)


def _execute(script: str, words: Sequence[str], folder: Path, *, stop: bool) -> None:
    path = Path(sys.path[0], f"{script}.py")
    os.chdir(folder)
    sys.stdout, sys.stderr = open("output.txt", "w"), open("errors.txt", "w")  # noqa: SIM115, this process ends with them
    if stop:
        _stop_at_first_state()
    sys.argv = [path.name, *words]
    runpy.run_path(str(path), run_name="__main__")


def _stop_at_first_state() -> None:
    replace = os.replace

    def replace_and_stop(source: Any, target: Any, **keywords: Any) -> None:
        replace(source, target, **keywords)
        if str(target).endswith("model_last.pt"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_stop


def compared(expected: Path, actual: Path) -> str:
    """`same`, or what differs between two folders in which a command ran."""
    statuses = [json.loads((folder / ENDED).read_text())["status"] for folder in (expected, actual)]
    if statuses[0] != 0:
        return f"fails in OLD: {_last_line(expected / 'errors.txt')}"
    if statuses[1] != 0:
        return f"{'refused' if statuses[1] == 2 else 'fails'}: {_last_line(actual / 'errors.txt')}"
    found = list(differences(expected, actual))
    more = f" and {len(found) - SHOWN_DIFFERENCES} more" if len(found) > SHOWN_DIFFERENCES else ""
    return f"{DIFFERENT}: {', '.join(found[:SHOWN_DIFFERENCES])}{more}" if found else SAME


def _last_line(path: Path) -> str:
    return (path.read_text().splitlines() or ["without a word"])[-1]


def differences(expected: Path, actual: Path) -> Iterator[str]:
    """What the second folder does not hold as the first one does; it may hold more."""
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file())
    for name in names:
        if NOT_COMPARED.search(name) or name == ENDED:
            continue
        if not (actual / name).exists():
            yield f"{name} is missing"
        else:
            yield from _file_differences(name, expected / name, actual / name)
    if not (expected / "saves").exists():
        lines = [TIMES.sub("", (folder / "output.txt").read_text()) for folder in (expected, actual)]
        yield from ["output"] if lines[0] != lines[1] else []


def _file_differences(name: str, expected: Path, actual: Path) -> Iterator[str]:
    if expected.suffix in (".pt", ".json", ".jsonl"):
        found = _values(_content(actual))
        for place, value in _values(_content(expected)).items():
            if place not in found:
                yield f"{name} {place} is missing"
            elif not _equal(value, found[place]):
                yield f"{name} {place}"
    elif expected.read_bytes() != actual.read_bytes():
        yield name


def _content(path: Path) -> Any:
    if path.suffix == ".pt":
        checkpoint = torch.load(path, weights_only=True)
        return {name: value for name, value in checkpoint.items() if name not in ("resume", "config", "sha256")}
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def _values(content: Any, place: str = "") -> dict[str, Any]:
    """The tensors and plain values of nested mappings and lists by their places, without those that vary."""
    if isinstance(content, dict):
        items = [(str(name), value) for name, value in content.items() if not VARYING.search(str(name))]
    elif isinstance(content, (list, tuple)):
        items = [(str(number), value) for number, value in enumerate(content)]
    else:
        return {place: content}
    return {key: value for name, item in items for key, value in _values(item, f"{place}/{name}").items()}


def _equal(expected: Any, actual: Any) -> bool:
    if not isinstance(expected, Tensor):
        return expected == actual or (expected != expected and actual != actual)  # NaN
    if not isinstance(actual, Tensor) or (expected.dtype, expected.shape) != (actual.dtype, actual.shape):
        return False
    return expected.contiguous().numpy().tobytes() == actual.contiguous().numpy().tobytes()


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
