"""Damaged and forged archives of the second codec, read within bounds of time and memory: how many are accepted wrongly.

python -m benchmarks.forged_archives
python -m benchmarks.forged_archives --files 15000 --seed 7

Each file is read in a forked process whose memory is limited. A third is damaged anywhere, with the digest that the whole file
had; a third has one section changed, with a digest that agrees; in a third the description says something else, also with such
a digest. Accepted wrongly are files whose digest does not agree, those whose stream of integers was changed, and networks with
other shapes than their description says, with values that are not finite, or with other bits when they are read again.
"""

import multiprocessing
import random
import resource
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import add_common_flags, machine, report
from models import build_model
from models.network_file import with_versions
from quantize.archive import differing_tensors, load_archive, pack_archive
from quantize.compression import Compressor
from quantize.container import pack_sections, read_description, unpack_sections
from quantize.layout import cut_network
from utils import cli
from utils.errors import UserError

SECONDS, MEMORY_BYTES = 10.0, 500 << 20  # for one file; the seconds are the process's own
MODEL, CLASSES, STEP = "resnet8", 10, 0.25  # the step in parts of the compressor's unit
VALUES = (
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**62,
    10**30,
    1e300,
    0.5,
    "",
    "resnet56",
    "alexnet",
    "\n" * 99,
    [],
    {},
    [0.0] * 17,
    [1e308],
)
DAMAGES = 4
FOUR_BYTES = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0")  # numbers that no count is
DAMAGED, SECTION, DESCRIPTION = KINDS = ("damaged", "section forged", "description forged")


class Forged(NamedTuple):
    """A file: of which kind, and whether no reader may accept it."""

    kind: str
    data: bytes
    is_invalid: bool


class Reading(NamedTuple):
    """What became of a file: accepted, wrongly accepted, the seconds of the process's own, and the bytes that it grew by."""

    kind: str
    accepted: bool
    wrong: str | None
    seconds: float
    memory_bytes: int


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(prog="forged_archives.py", description="Read forged archives within bounds of time and memory.")
    parser.add_argument("--files", type=cli.positive_int, default=1500, help="how many files are forged")
    parser.add_argument("--seed", type=int, default=0, help="of what is forged")
    add_common_flags(parser, name="forged_archives", rounds=1, cpu_only=True)
    return parser


def main(args: Any) -> None:
    readings = read_bounded(honest_archive(), files=args.files, seed=args.seed)
    rows = rows_of(readings)
    report("forged_archives", rows, output=args.output, machine=machine(torch.device("cpu")), files=args.files, seed=args.seed)
    wrong = sorted({reading.wrong for reading in readings if reading.wrong})
    if wrong:
        raise UserError(f"{sum(row['accepted wrongly'] for row in rows)} files were accepted wrongly: {'; '.join(wrong)}")


def honest_archive() -> bytes:
    """A compressed network of random weights."""
    torch.manual_seed(0)
    network = build_model(MODEL, num_classes=CLASSES).eval()
    compressor = Compressor(network, [torch.randn(8, 3, 32, 32)])
    found = compressor.compress(compressor.unit * STEP)
    return pack_archive(found.network, model=MODEL, num_classes=CLASSES, weights=found.weights)[0]


def forgeries(data: bytes, *, files: int, seed: int) -> Iterator[Forged]:
    """Files that differ from the honest `data`."""
    choose, count = random.Random(seed), 0
    while count < files:
        forged = (_damaged, _section_forged, _description_forged)[count % len(KINDS)](data, choose)
        if forged.data != data:
            count += 1
            yield forged


def read_bounded(data: bytes, *, files: int, seed: int) -> list[Reading]:
    """Reads them all in a forked process. A file that needs more memory than it may raises MemoryError there, which is wrong."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_read_all, args=(sender, data, files, seed))
    process.start()
    sender.close()
    readings = []
    while len(readings) < files:
        try:
            readings.append(receiver.recv())
        except EOFError as error:
            raise UserError(f"the reader ended at file {len(readings)} without a word") from error
    process.join()
    return readings


def rows_of(readings: list[Reading]) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        own = [reading for reading in readings if reading.kind == kind]
        over = [reading for reading in own if reading.seconds > SECONDS or reading.memory_bytes > MEMORY_BYTES]
        rows.append(
            {
                "files": kind,
                "count": len(own),
                "refused": sum(not reading.accepted for reading in own),
                "accepted as another network": sum(reading.accepted and reading.wrong is None for reading in own),
                "accepted wrongly": sum(reading.wrong is not None for reading in own),
                "over the bounds": len(over),
                "slowest, s": max((reading.seconds for reading in own), default=None),
                "most memory, MB": max((reading.memory_bytes / 2**20 for reading in own), default=None),
            }
        )
    return rows


def _read_all(sender: Any, data: bytes, files: int, seed: int) -> None:
    used = _pages("/proc/self/statm", 0)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.huff"
        for forged in forgeries(data, files=files, seed=seed):
            path.write_bytes(forged.data)
            sender.send(_read(path, forged))


def _read(path: Path, forged: Forged) -> Reading:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts from what is resident now
    before, start = _peak_bytes(), time.process_time()
    wrong = None
    try:
        network = load_archive(path)
    except UserError as error:
        network, message = None, str(error).removeprefix(f"{path}: ")
        wrong = f"refused in many words: {message[:80]!r}" if "\n" in message or len(message) > 600 else None
    except Exception as error:  # of which a reader must raise none
        network, wrong = None, f"{type(error).__name__} is raised"
    seconds, memory = time.process_time() - start, _peak_bytes() - before
    if network is not None:
        wrong = "an invalid file is read" if forged.is_invalid else _fault(network, path)
    return Reading(forged.kind, network is not None, wrong, seconds, memory)


def _fault(network: torch.nn.Module, path: Path) -> str | None:
    """What is wrong with a network that a forged file is read as."""
    description = read_description(path.read_bytes())
    dense = build_model(description["model"], num_classes=description["num_classes"])
    expected = cut_network(dense, dict(getattr(network, "kept", {})), None).state_dict()
    state = network.state_dict()
    if {name: tensor.shape for name, tensor in with_versions(state, like=expected).items()} != {
        name: tensor.shape for name, tensor in expected.items()
    }:
        return "a network has other shapes than its file says"
    if any(name.endswith("weight") and tensor.dim() > 1 and not tensor.isfinite().all() for name, tensor in state.items()):
        return "a network has weights that are not finite"
    return "a network is not the same when it is read again" if differing_tensors(network, load_archive(path)) else None


def _peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def _pages(path: str, field: int) -> int:
    return int(Path(path).read_text().split()[field]) * resource.getpagesize()


def _damaged(data: bytes, choose: random.Random) -> Forged:
    return Forged(DAMAGED, _changed(data, choose), is_invalid=True)


def _section_forged(data: bytes, choose: random.Random) -> Forged:
    description = read_description(data)
    sections = {name: bytes(section) for name, section in unpack_sections(data, description).items()}
    name = choose.choice(sorted(sections))
    section = sections[name]
    if name == "roles" and choose.random() < 0.8:  # else the deflated bytes themselves
        section = zlib.compress(_changed(zlib.decompress(section), choose), 9)
    elif choose.random() < 0.1:
        section = choose.randbytes(choose.randrange(2 * len(section) + 2))
    else:
        section = _changed(section, choose)
    is_invalid = name == "words" and section != sections[name]
    return Forged(SECTION, _packed({**sections, name: section}, description), is_invalid=is_invalid)


def _description_forged(data: bytes, choose: random.Random) -> Forged:
    description = read_description(data)
    sections = unpack_sections(data, description)
    name = choose.choice([*description, "fills", "num_classes", "extra"])
    if name == "fills" and choose.random() < 0.5:  # values that networks may have
        value: Any = [choose.uniform(-2, 2) for _ in description["fills"]]
    else:
        value = choose.choice((*VALUES, choose.randrange(1 << 20)))
    return Forged(DESCRIPTION, _packed(sections, {**description, name: value}), is_invalid=name in ("extra", "sha256"))


def _packed(sections: Any, description: dict[str, Any]) -> bytes:
    """With a digest that agrees, unless the description holds another."""
    honest = {name: value for name, value in description.items() if name != "sha256"}
    is_own = isinstance(description.get("sha256"), str) and len(description["sha256"]) == 64
    return pack_sections(sections, honest if is_own else description)


def _changed(data: bytes, choose: random.Random) -> bytes:
    """With bits flipped, the end cut off, bytes put in, taken out, or written over."""
    if not data:
        return choose.randbytes(choose.randint(1, 9))
    data, position = bytearray(data), choose.randrange(len(data))
    kind = choose.randrange(DAMAGES + 1)
    if kind < DAMAGES:
        damage(data, choose, kind=kind, position=position)
    else:
        data[position : position + 4] = choose.choice(FOUR_BYTES)
    return bytes(data)


def damage(data: bytearray, choose: random.Random, *, kind: int, position: int) -> None:
    """One of `DAMAGES` kinds: bits flipped anywhere; from `position` on the end cut off, bytes put in, or bytes taken out."""
    if kind == 0:
        for _ in range(choose.choice((1, 1, 2, 8))):
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    elif kind == 1:
        del data[position:]
    elif kind == 2:
        data[position:position] = choose.randbytes(choose.randint(1, 40))
    else:
        del data[position : position + choose.randint(1, 40)]


if __name__ == "__main__":
    cli.execute(lambda: main(get_args_parser().parse_args()))
