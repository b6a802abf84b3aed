"""Three thousand damaged and forged files: each is refused in one line or read as what it says, in bounded time and memory."""

import io
import json
import random
import time
import zipfile

import pytest
import torch
from bounded import run_bounded
from saved_runs import write_pruned

from models import build_model
from models.network_file import describe_network, load_network
from quantize.archive import load_archive, save_archive
from reporting.gather import gather
from utils.checkpoints import digest, save_checkpoint
from utils.errors import UserError

MAX_LINE = 600
SECONDS = 10.0  # of the process's own time, for one file; well below 1 where the machine does nothing else
VALUES = (
    None,
    True,
    -1,
    0,
    2**62,
    1e999,
    "",
    "\ud800\n" * 99,
    [],
    {},
    [[1]],
    {"a": {}},
    b"x",
    torch.zeros(2),
    torch.ones(()) > 0,
)


def damaged(data: bytes, choose: random.Random) -> bytes:
    """With bits flipped, the end cut off, or bytes put in, taken out, or written over."""
    data, position = bytearray(data), choose.randrange(len(data))
    kind = choose.randrange(5)
    if kind == 0:
        data[position] ^= 1 << choose.randrange(8)
    elif kind == 1:
        del data[position:]
    elif kind == 2:
        data[position:position] = choose.randbytes(9)
    elif kind == 3:
        del data[position : position + 9]
    else:
        data[position : position + 4] = choose.choice((b"\xff\xff\xff\x7f", b"\0\0\0\0", b"1e99", b"[[[["))
    return bytes(data)


def forged(checkpoint: dict, choose: random.Random) -> bytes:
    """A checkpoint with a field, an entry of its state, or its pickle replaced, and a digest that agrees."""
    checkpoint = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}
    place = choose.choice((checkpoint, checkpoint["state_dict"]))
    place[choose.choice([*place, "kept", "class_names"])] = choose.choice(VALUES)
    buffer = io.BytesIO()
    torch.save({**checkpoint, "sha256": digest(checkpoint)}, buffer)
    if choose.random() < 0.5:
        return buffer.getvalue()
    again = io.BytesIO()
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(again, "w") as other:
        for name in whole.namelist():
            content = whole.read(name)
            other.writestr(name, damaged(content, choose) if name.endswith("data.pkl") else content)
    return again.getvalue()


def refused(path, data: bytes, read) -> bool:
    """Whether `read` refuses these bytes, in one bounded line and bounded time."""
    path.write_bytes(data)
    start = time.process_time()
    try:
        read(path)
        return False
    except UserError as error:
        message = str(error).replace(str(path), "")
        assert "\n" not in message and len(message) < MAX_LINE, message
        return True
    finally:
        assert time.process_time() - start < SECONDS


def count_refused(path, variants, read) -> int:
    return sum(refused(path, data, read) for data in variants)


@pytest.fixture(scope="module")
def checkpoint() -> dict:
    torch.manual_seed(0)
    return describe_network(build_model("resnet8", num_classes=10).state_dict(), model="resnet8", num_classes=10, config={})


def read_network(path) -> None:
    load_network(path, flag="--t-path")


def test_checkpoints(checkpoint, tmp_path):
    choose = random.Random(0)
    save_checkpoint(tmp_path / "whole.pt", checkpoint)
    data = (tmp_path / "whole.pt").read_bytes()
    variants = [damaged(data, choose) for _ in range(200)] + [forged(checkpoint, choose) for _ in range(200)]
    assert 200 < run_bounded(count_refused, tmp_path / "a.pt", variants, read_network) < 400


def test_archives(tmp_path):
    choose = random.Random(1)
    save_archive(tmp_path / "whole", build_model("resnet8", num_classes=10), model="resnet8", num_classes=10)
    data = (tmp_path / "whole").read_bytes()
    assert run_bounded(count_refused, tmp_path / "a", [damaged(data, choose) for _ in range(400)], load_archive) > 390


@pytest.mark.parametrize(("name", "count"), [("config.json", 900), ("summary.json", 500), ("metrics.jsonl", 800)])
def test_files_of_a_run(name, count, tmp_path):
    choose = random.Random(2)
    run = write_pruned(tmp_path / "run", top1=90.0)
    data = (run / name).read_bytes()
    plain = [value for value in VALUES if not isinstance(value, bytes | torch.Tensor)]
    variants = [damaged(data, choose) for _ in range(count // 2)]
    for _ in range(count // 2):
        content = json.loads(data.splitlines()[0])
        inner = choose.choice([content, *(value for value in content.values() if isinstance(value, dict))])
        inner[choose.choice(list(inner))] = choose.choice(plain)
        variants.append(json.dumps(content).encode())
    assert 0 < run_bounded(count_refused, run / name, variants, lambda _: gather([run])) < count
