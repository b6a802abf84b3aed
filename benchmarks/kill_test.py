"""Kills runs without warning, resumes them, and compares everything they leave with runs that nobody touched.

    python3 benchmarks/kill_test.py --kills 50

A run is a process forked from this one, which has paid for the imports once. SIGKILL comes at a moment drawn from all those
at which the run touches a file or ends a step, or at a random time, or, by a limit on the size of files, in the middle of
a write. A run is killed one to three times before it may end. Exit status 1 if a number differs at the end.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from tensorboardX.proto.event_pb2 import Event

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, profile
from utils.checkpoints import digest, load_checkpoint
from utils.images.datasets import load_dataset
from utils.runs import tensorboard
from utils.training.trainer import Trainer

RUN = Path("saves", "run")
TIMINGS = frozenset(("seconds", "images_per_second", "latency"))
VARYING = TIMINGS | {"git_sha", "resumptions"}  # the repository may change meanwhile, and who is never killed never resumes
PASSING = ("lock",)  # says who works on the run, not what came of it
MAX_KILLS_A_RUN = 3
COMMON_FLAGS = "--n-epochs 3 --limit-batches 2 --batch-size 16 --schedule 1 --lr-drops 0.5 --device cpu"
PRUNING_FLAGS = f"--s-copy-t --prune-rates 0.6 --run-name run {COMMON_FLAGS}"

BUDGET_FLAGS = PRUNING_FLAGS.replace("--prune-rates 0.6", "--budget macs=0.6")


class Recipe(NamedTuple):
    """A run: its entry script and flags; `{teacher}` stands for the checkpoint of a trained network."""

    name: str
    script: str
    flags: str

    def words(self, teacher: Path) -> list[str]:
        return [word.format(teacher=teacher) for word in self.flags.split()]


TEACHER = Recipe("teacher", "initial_train", f"--model resnet20 --run-name run --lr 0.05 {COMMON_FLAGS}")
RECIPES = (
    TEACHER,
    Recipe("averaged", "initial_train", f"--model resnet20 --ema 0.9 --run-name run --lr 0.05 {COMMON_FLAGS}"),
    Recipe("tuned", "initial_train", f"--load-path {{teacher}} --ema 0.9 --ships trained --run-name run {COMMON_FLAGS}"),
    Recipe("hard + AFD", "pruning", f"{PRUNING_FLAGS} --t-path {{teacher}} --prune-mode filter-nggm --distill afd"),
    Recipe(
        "soft + HAP",
        "pruning",
        f"{PRUNING_FLAGS} --t-path {{teacher}} --prune-mode filter-l2 --soft-prune --distill hap --checkpoint-minutes 0",
    ),
    Recipe("coupled", "pruning", f"{BUDGET_FLAGS} --t-path {{teacher}} --prune-mode filter-a --couple-channels --distill kd"),
    Recipe("recalibrated", "pruning", f"{PRUNING_FLAGS} --t-path {{teacher}} --prune-mode filter-gm --recalibrate-bn 2"),
    Recipe("reconstructed", "pruning", f"{PRUNING_FLAGS} --t-path {{teacher}} --prune-mode filter-a --reconstruct 64"),
    Recipe("quantization", "quantize_encode", f"--load-path {{teacher}} --quan-bits 4 --run-name run {COMMON_FLAGS}"),
    Recipe("int8", "quantize_encode", f"--load-path {{teacher}} --quan-mode int8 --run-name run {COMMON_FLAGS}"),
)


class Moments:
    """Notes the moments of the process it is installed in, and sends it signals at one of them."""

    def __init__(self, *, fatal: int | None, signals: Sequence[int]):
        self.fatal, self.signals = fatal, signals
        self.names: list[str] = []

    def pass_by(self, name: str) -> None:
        if len(self.names) == self.fatal:
            for number in self.signals:
                os.kill(os.getpid(), number)
        self.names.append(name)

    def install(self) -> None:
        """A moment lies before and after every call that changes a file, and after every training step."""
        for module, name in ((os, "open"), (os, "write"), (os, "fchmod"), (os, "fsync"), (os, "link"), (os, "replace"),
                             (os, "rename"), (os, "unlink"), (shutil, "rmtree"), (torch, "save"),
                             (tensorboard.EventsWriter, "flush"), (Trainer, "_train_step")):  # fmt: skip
            setattr(module, name, self._watched(getattr(module, name)))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **keywords: Any) -> Any:
            self.pass_by(f"before {function.__name__}")
            result = function(*args, **keywords)
            self.pass_by(f"after {function.__name__}")
            return result

        return watched


def start(
    script: str,
    words: Sequence[str],
    *,
    folder: Path,
    fatal: int | None = None,
    signals: Sequence[int] = (signal.SIGKILL,),
    file_limit: int | None = None,
) -> int:
    """Forks a process that runs `script` in `folder`, and gives its id.

    It is sent `signals` at moment number `fatal`, and dies in the write that would make a file larger than `file_limit`
    bytes. Its output goes to `folder`/output.txt; the names of its moments, if it ends by itself, to `folder`/moments.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "output.txt").touch()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _run(script, words, folder=folder, moments=Moments(fatal=fatal, signals=signals), file_limit=file_limit)
    return child


def _run(script: str, words: Sequence[str], *, folder: Path, moments: Moments, file_limit: int | None) -> NoReturn:
    status = 1
    os.chdir(folder)
    log = open("output.txt", "a")  # noqa: SIM115, this process ends with it
    sys.stdout = sys.stderr = log
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        profile.MIN_RUN_SECONDS = 0.0  # times are not compared
        if file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        moments.install()
        status = _execute(script, words)
        Path("moments.json").write_text(json.dumps(moments.names))
    except BaseException:  # this process ends below, and nobody else would hear of it
        traceback.print_exc()
    finally:
        log.flush()
        os._exit(status)


def _execute(script: str, words: Sequence[str]) -> int:
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *words]
    try:
        cli.run_script(module.get_args_parser, module.main, words)
    except SystemExit as end:
        return end.code


def wait(child: int) -> int:
    """The exit status of a process, minus the signal's number if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def go_on(script: str, words: Sequence[str], *, folder: Path, **kill: Any) -> int:
    """Resumes the run in `folder`; one that died before it had a folder starts again."""
    return start(script, ["--resume", str(RUN)] if (folder / RUN).exists() else words, folder=folder, **kill)


def moments_of(folder: Path) -> list[str]:
    """The names of the moments of the last process that ended by itself in `folder`, in their order."""
    return json.loads((folder / "moments.json").read_text())


def differences(expected: Path, actual: Path) -> list[str]:
    """What two finished runs left that is not the same, timings aside: every file of either is compared."""
    names = sorted({path.relative_to(folder).parts[0] for folder in (expected, actual) for path in folder.rglob("*")})
    return [f"{name} differs" for name in names if name not in PASSING and _content(expected / name) != _content(actual / name)]


def _content(path: Path) -> Any:
    """What is compared of a file: of a checkpoint its digest, of JSON all but timings, of TensorBoard's folder the points."""
    if not path.exists():
        return None
    if path.is_dir():
        return curves(path)
    kinds = {".pt": lambda: digest(load_checkpoint(path)), ".json": lambda: _json(path), ".jsonl": lambda: _metrics(path)}
    return kinds.get(path.suffix, path.read_bytes)()


def _json(path: Path) -> Any:
    return _without_varying(json.loads(path.read_text()))


def _without_varying(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_varying(item) for name, item in value.items() if name not in VARYING}
    return [_without_varying(item) for item in value] if isinstance(value, list) else value


def _metrics(path: Path) -> list[dict[str, Any]]:
    return [_without_varying(json.loads(line)) for line in path.read_text().splitlines()]


def curves(folder: Path) -> Counter[tuple[str, int, float]]:
    """How often each point was written, timings aside."""
    points: Counter[tuple[str, int, float]] = Counter()
    for path in folder.iterdir():
        for event in _events(path.read_bytes()):
            for value in event.summary.value:
                if value.tag.split("/")[-1] not in TIMINGS:
                    points[value.tag, event.step, value.simple_value] += 1
    return points


def _events(data: bytes) -> Iterator[Event]:
    """The records of a TensorBoard file: length (8 bytes), its checksum (4), content, checksum (4)."""
    position = 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        yield Event.FromString(data[position + 12 : position + 12 + length])
        position += length + 16


class Tally(NamedTuple):
    """What the kills of one recipe came to."""

    recipe: str
    runs: int
    kills: Counter[str]
    lost: list[str]


def torment(recipe: Recipe, *, kills: int, teacher: Path, folder: Path, source: random.Random) -> Tally:
    """Kills runs of `recipe`, `kills` times in all, and compares each with one that was left alone."""
    words, reference = recipe.words(teacher), folder / "untouched"
    began = time.monotonic()
    if wait(start(recipe.script, words, folder=reference)) != 0:
        raise RuntimeError(f"{recipe.name} fails by itself: {(reference / 'output.txt').read_text()}")
    seconds, moments = time.monotonic() - began, len(moments_of(reference))
    counts: Counter[str] = Counter()
    lost, runs = [], 0
    while counts.total() < kills:
        runs += 1
        place = folder / f"run{runs}"
        wanted = min(source.randint(1, MAX_KILLS_A_RUN), kills - counts.total())
        for _ in range(wanted):
            counts[_kill_once(recipe, words, place, moments=moments, seconds=seconds, source=source)] += 1
        status = wait(go_on(recipe.script, words, folder=place))
        found = differences(reference / RUN, place / RUN) if status == 0 else [f"exit status {status} after resuming"]
        lost += [f"{recipe.name}, run {runs}: {problem}" for problem in found]
        if not found:
            shutil.rmtree(place)
    return Tally(recipe.name, runs, counts, lost)


def _kill_once(recipe: Recipe, words: Sequence[str], place: Path, *, moments: int, seconds: float, source: random.Random) -> str:
    """Starts or resumes the run and sees it killed; says how. One that ends before its time came is begun anew."""
    while True:
        kind = source.choices(("at a moment", "in a write", "at a time"), weights=(6, 1, 3))[0]
        limits = {"at a moment": {"fatal": source.randrange(moments)}, "in a write": {"file_limit": source.randrange(10**6)}}
        child = go_on(recipe.script, words, folder=place, **limits.get(kind, {}))
        if kind == "at a time":
            time.sleep(source.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        status = wait(child)
        if status in (-signal.SIGKILL, -signal.SIGXFSZ):
            return kind
        shutil.rmtree(place)


def print_table(tallies: Sequence[Tally], *, seconds: float) -> None:
    kinds = ("at a moment", "in a write", "at a time")
    print(f"{'runs of':14}{'runs':>6}{'kills':>7}" + "".join(f"{kind:>13}" for kind in kinds) + f"{'different':>11}")
    for tally in tallies:
        row = f"{tally.recipe:14}{tally.runs:>6}{tally.kills.total():>7}"
        print(row + "".join(f"{tally.kills[kind]:>13}" for kind in kinds) + f"{len(tally.lost):>11}")
    kills, lost = sum(tally.kills.total() for tally in tallies), sum(len(tally.lost) for tally in tallies)
    print(f"{kills} kills, {lost} differences, {seconds:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} thread")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how often to kill, over all recipes")
    names = [recipe.name for recipe in RECIPES]
    parser.add_argument("--recipes", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--keep", action="store_true", help="keep the folder of all runs, where a different one can be looked at")
    return parser


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # what is forked has no helper threads, and sums have one order
    began, source = time.monotonic(), random.Random(args.seed)
    for script in {recipe.script for recipe in RECIPES} | {TEACHER.script}:
        importlib.import_module(script)
    load_dataset("digits")  # imports, too
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="kill-test-"))
        if not args.keep:
            stack.callback(shutil.rmtree, folder)
        if wait(start(TEACHER.script, TEACHER.words(folder), folder=folder / "teacher")) != 0:
            raise RuntimeError((folder / "teacher" / "output.txt").read_text())
        teacher = folder / "teacher" / RUN / "model_best.pt"
        recipes = [recipe for recipe in RECIPES if recipe.name in args.recipes]
        each = math.ceil(args.kills / len(recipes))
        tallies = [
            torment(recipe, kills=each, teacher=teacher, folder=folder / str(number), source=source)
            for number, recipe in enumerate(recipes)
        ]
    print_table(tallies, seconds=time.monotonic() - began)
    problems = [problem for tally in tallies for problem in tally.lost]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()))
