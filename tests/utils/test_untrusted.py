"""Files that claim to be larger than they are: each refused in one line, within a second and 500 MB."""

import argparse
import collections
import io
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from bounded import run_bounded

from models import build_model
from models.network_file import describe_network, load_network
from quantize.archive import load_archive
from reporting.run_files import read_study
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.files import read_json
from utils.python_file import check_function
from utils.runs.metrics_file import read_metrics
from utils.untrusted import Inert

SECONDS = 10.0  # of the process's own time; well below 1 where the machine does nothing else
GIGABYTES_25 = 25 * 10**9
WEIGHT = torch.arange(12.0).view(3, 4)


def torch_file(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def with_pickle(content: bytes, *, compression: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None) -> bytes:
    """A file of torch.save with another pickle inside."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_file({"a": WEIGHT}))) as whole, zipfile.ZipFile(buffer, "w", compression) as forged:
        for name in whole.namelist():
            forged.writestr(name, content if name.endswith("data.pkl") else whole.read(name))
        for name, data in (more or {}).items():
            forged.writestr(name, data)
    return buffer.getvalue()


def called(module: str, name: str, *arguments) -> bytes:
    """The pickle of {"a": module.name(*arguments)}."""
    packed = pickle.dumps(arguments, protocol=2)[2:-1]
    return b"\x80\x02}X\x01\x00\x00\x00ac" + f"{module}\n{name}\n".encode() + packed + b"Rs."


def doubled(times: int) -> list:
    """A list of two lists that are the same, of two that are the same, and so on: short to write, endless to walk."""
    value: list = [0]
    for _ in range(times):
        value = [value, value]
    return value


def nested_hex(times: int) -> bytes:
    """Text in hexadecimal digits, in hexadecimal digits, and so on: each call doubles it."""
    body = b"X\x01\x00\x00\x00x"
    for _ in range(times):
        body = b"h\x00(" + body + b"X\x03\x00\x00\x00hextR"
    return b"\x80\x02c_codecs\nencode\nq\x000}X\x01\x00\x00\x00a" + body + b"s."


def many_copies(count: int) -> bytes:
    """One long list of pairs, and as many mappings made of it as the list has pairs."""
    pairs = b"(" + b"".join(b"(J" + struct.pack("<i", number) + b"Nt" for number in range(count)) + b"l"
    copies = b"h\x00h\x01\x85R" * count
    return b"\x80\x02ccollections\nOrderedDict\nq\x000" + pairs + b"q\x010}X\x01\x00\x00\x00a(" + copies + b"ls."


def huge_shapes(count: int) -> bytes:
    """One shape with many dimensions, for many tensors."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQ"
    shape = b"(" + b"K\x01" * count + b"tq\x010"
    tensor = b"(" + storage + b"K\x00h\x01h\x01\x89ccollections\nOrderedDict\n)RtR"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n" + tensor
    return b"\x80\x02" + shape + b"}X\x01\x00\x00\x00a(" + rebuilt * (count // 10) + b"ls."


def deep(times: int) -> list:
    value: list = []
    for _ in range(times):
        value = [value]
    return value


def legacy(value) -> bytes:
    return torch_file(value, _use_new_zipfile_serialization=False)


def encoded_again(count: int) -> bytes:
    """One long text, turned into bytes as often as the file says."""
    code = b"X\x06\x00\x00\x00latin1q\x02"
    text = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x01"
    body = text + code + b"\x86h\x00h\x01h\x02\x86R" * count
    return b"\x80\x02c_codecs\nencode\nq\x00}X\x01\x00\x00\x00a(" + body + b"ls."


ONE = torch.zeros(1)
WIDE = ONE.expand(GIGABYTES_25 // 4)
SHARED = torch.zeros(250_000)
ATTACKS = {
    "one stored number, 25 GB": lambda: torch_file({"a": WIDE}),
    "one stored number, 25 GB, in a checkpoint": lambda: torch_file(
        {"format": 1, "model": "resnet8", "num_classes": 10, "state_dict": {"a": WIDE}, "sha256": "0" * 64}
    ),
    "one stored number, 25 GB, old form": lambda: legacy({"a": WIDE}),
    "a megabyte, 4,000 times": lambda: torch_file({str(number): SHARED[: 250_000 - number % 7] for number in range(4_000)}),
    "compressed": lambda: with_pickle(
        pickle.dumps({"a": 1}, protocol=2), compression=zipfile.ZIP_DEFLATED, more={"archive/data/1": bytes(100 << 20)}
    ),
    "compressed pickle": lambda: with_pickle(b"\x80\x02" + b"(" * (50 << 20) + b".", compression=zipfile.ZIP_DEFLATED),
    "tensor of any size": lambda: with_pickle(called("torch", "FloatTensor", 10**5, 10**5)),
    "tensor class": lambda: with_pickle(called("torch", "Tensor", 10**5, 10**5)),
    "storage of any size": lambda: with_pickle(called("torch.storage", "UntypedStorage", GIGABYTES_25)),
    "bytearray of any size": lambda: with_pickle(called("builtins", "bytearray", GIGABYTES_25)),
    "bytearray of any size, old form": lambda: torch_legacy_with(called("builtins", "bytearray", GIGABYTES_25)),
    "hexadecimal digits of hexadecimal digits": lambda: with_pickle(nested_hex(40)),
    "a text made into bytes again and again": lambda: with_pickle(encoded_again(50_000)),
    "a list copied as often as it is long": lambda: with_pickle(many_copies(20_000)),
    "a shape copied as often as it is long": lambda: with_pickle(huge_shapes(50_000)),
    "doubled": lambda: torch_file({"a": doubled(200)}),
    "doubled, with a digest": lambda: torch_file({"format": 1, "sha256": "0" * 64, "state_dict": doubled(200)}),
    "nested": lambda: with_pickle(b"\x80\x02}X\x01\x00\x00\x00a" + b"(" * 10**6 + b"t" * 10**6 + b"s."),
    "nested, at the edge": lambda: torch_file({"a": deep(300)}),
    "names without an end": lambda: with_pickle(b"\x80\x02}X\xff\xff\xff\xffa."),
}


def torch_legacy_with(content: bytes) -> bytes:
    """A file of torch before 1.6 with another pickle as its content."""
    head = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + content


def refusals(folder: Path) -> dict[str, tuple[str, float]]:
    """By attack the message, and the seconds of this process's own time that it took."""
    found = {}
    for name in ATTACKS:
        path = folder / name
        start = time.process_time()
        try:
            load_checkpoint(path, flag="--t-path")
            found[name] = ("", 0.0)
        except UserError as error:
            found[name] = (str(error).removeprefix(f"--t-path {path}: "), time.process_time() - start)
    return found


def test_files_that_claim_more_than_they_hold_cost_no_more_than_they_are(tmp_path):
    for name, make in ATTACKS.items():
        (tmp_path / name).write_bytes(make())
        assert (tmp_path / name).stat().st_size < 5 << 20, name
    for name, (message, seconds) in run_bounded(refusals, tmp_path).items():
        assert message, f"{name} was read"
        assert message.startswith(("refused, ", "damaged")) and "\n" not in message and len(message) < 300, (name, message)
        assert seconds < SECONDS, (name, seconds)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "_rebuild_qtensor|QUInt8Storage"),
        (torch.empty(3, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (torch.ones(3, dtype=torch.complex64), "ComplexFloatStorage"),
        (torch.ones(3, dtype=torch.float8_e4m3fn), "Untyped|float8|_rebuild_tensor_v3"),
    ],
)
def test_tensors_that_are_not_plain_are_refused_by_their_kind(tensor, kind, tmp_path):
    torch.save({"conv.weight": tensor}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"refused, holds more than tensors and plain values: .*({kind})"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("key", [(1, 2), b"a", torch.float32])
def test_keys_that_are_no_names_are_refused(key, tmp_path):
    torch.save({"a": {key: 1}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="refused, "):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("form", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize(
    "content",
    [
        torch.nn.Linear(3, 4).state_dict(),
        {"weight": torch.nn.Parameter(WEIGHT), "again": WEIGHT.t(), "shape": WEIGHT.shape, "dtype": torch.float16},
        {"optimizer": torch.optim.Adam([torch.nn.Parameter(WEIGHT)]).state_dict(), "milestones": collections.Counter([30, 60])},
        {"state_dict": {"a": torch.ones(3).bfloat16(), "b": torch.zeros(0, 3), "c": torch.tensor(True)}, "best": 93.5},
        {"a": WEIGHT, "best": np.float64(93.5), "top5": np.float64(99.0), "epoch": np.int64(3), "history": np.arange(30.0)},
        {"a": WEIGHT, "args": argparse.Namespace(lr=0.1, folder=Path("x"), lrs=[1, 2]), "again": argparse.Namespace(lr=0.1)},
    ],
)
def test_what_people_save_is_read(content, form, tmp_path):
    torch.save(content, tmp_path / "a.pt", **form)
    assert load_checkpoint(tmp_path / "a.pt").keys() == content.keys()


def test_settings_and_scores_beside_tensors_are_read_without_their_content(tmp_path):
    torch.save({"a": WEIGHT, "args": argparse.Namespace(lr=0.1), "best": np.float64(93.5)}, tmp_path / "a.pt")
    read = load_checkpoint(tmp_path / "a.pt")
    assert (type(read["args"]), vars(read["args"]), type(read["best"])) == (Inert, {}, Inert)


@pytest.mark.parametrize("code", ["hex", "utf-7"])
def test_bytes_are_read_in_one_code_alone(code, tmp_path):
    (tmp_path / "a.pt").write_bytes(with_pickle(called("_codecs", "encode", "text", code)))
    with pytest.raises(UserError, match=r"holds more than tensors and plain values: _codecs\.encode"):
        load_checkpoint(tmp_path / "a.pt")


def test_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.torch.save({"a": WEIGHT}))
    assert torch.equal(load_checkpoint(path)["a"], WEIGHT)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged or truncated, not a readable checkpoint"):
        load_checkpoint(path)


def test_pickles_of_all_our_states_are_plain(trained_run):
    for name in ("model_best.pt", "model_last.pt"):
        assert load_checkpoint(trained_run / name)["format"] == 1


class TestNoOrdinaryFile:
    """A pipe would block, and a device has no end."""

    @pytest.fixture
    def pipe(self, tmp_path) -> Path:
        os.mkfifo(tmp_path / "a")
        return tmp_path / "a"

    def test_pipe(self, pipe):
        with pytest.raises(UserError, match=r"--t-path .*/a: is no ordinary file but a pipe"):
            load_checkpoint(pipe, flag="--t-path")
        with pytest.raises(UserError, match=r"/a is no ordinary file but a pipe"):
            read_json(pipe)

    def test_link_to_a_device(self, tmp_path):
        (tmp_path / "a").symlink_to("/dev/zero")
        with pytest.raises(UserError, match=r"is no ordinary file but a device"):
            load_checkpoint(tmp_path / "a")
        with pytest.raises(UserError, match=r"is no ordinary file but a device"):
            read_json(tmp_path / "a")

    def test_link_to_a_checkpoint(self, tmp_path):
        save_checkpoint(tmp_path / "a.pt", {"format": 1})
        (tmp_path / "b.pt").symlink_to("a.pt")
        assert load_checkpoint(tmp_path / "b.pt") == {"format": 1}


@pytest.mark.parametrize("depth", [101, 1000, 500_000])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
def test_json_nested_without_an_end(depth, brackets, tmp_path):
    (tmp_path / "a.json").write_text(brackets[0] * depth + "0" + brackets[1] * depth)
    with pytest.raises(UserError, match="is damaged: nested "):
        read_json(tmp_path / "a.json")


CLAIMED_BYTES = 40 * 10**9


@pytest.mark.parametrize(
    "read",
    [
        load_checkpoint,
        read_json,
        load_archive,
        lambda path: read_metrics(path.parent),
        lambda path: check_function(f"{path}:network"),
        lambda path: read_study(path),
    ],
    ids=["checkpoint", "JSON", "archive", "metrics", "code", "study"],
)
@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"\x80\x02X\xff\xff\xff\x7f", b"\0" * 8 + b"{"])
def test_a_file_that_claims_forty_gigabytes_is_not_read(read, head, tmp_path):
    path = tmp_path / "metrics.jsonl.py"
    path.write_bytes(head)
    os.truncate(path, CLAIMED_BYTES)
    (tmp_path / "metrics.jsonl").hardlink_to(path)
    with pytest.raises(UserError, match=r"claims to have 40,000,000,000 bytes|is damaged, or no study|an archive, expected"):
        run_bounded_or_raise(read, path)


def run_bounded_or_raise(read, path) -> None:
    """`read(path)` within bounds of memory and time; its UserError is raised here."""
    message, seconds = run_bounded(refusal, read, path)
    assert seconds < SECONDS
    raise UserError(message)


def refusal(read, path) -> tuple[str, float]:
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        read(path)
    return str(caught.value), time.process_time() - start


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ({"stage_1.0.conv_a": [0] * 10**6}, "stage_1.0.conv_a"),
        ({"stage_1.0.conv_a": list(range(10**6))}, "stage_1.0.conv_a"),
        ({f"layer{number}": [0] for number in range(10**6)}, "more than 500,000 operations"),
    ],
    ids=["one channel", "a layer", "layers"],
)
def test_a_million_entries_are_checked_at_once(kept, expected, tmp_path):
    state = build_model("resnet8", num_classes=10).state_dict()
    checkpoint = describe_network(state, model="resnet8", num_classes=10, config={})
    save_checkpoint(tmp_path / "a.pt", {**checkpoint, "kept": kept})
    message, seconds = refusal(lambda path: load_network(path, flag="--t-path"), tmp_path / "a.pt")
    assert expected in message and "\n" not in message and len(message) < 400
    assert seconds < SECONDS


def test_numbers_between_other_operations_are_followed(tmp_path):
    """What is passed over at once must leave the stack as it would be: a call behind it is still seen."""
    numbers = b"K\x01M\x01\x02J\x01\x02\x03\x04G\x3f\xf0\0\0\0\0\0\0N\x88\x89"
    forged = b"\x80\x02}X\x01\x00\x00\x00a(" + numbers + b"lX\x01\x00\x00\x00bcposix\nsystem\n(" + numbers + b"tRu."
    (tmp_path / "a.pt").write_bytes(with_pickle(forged))
    with pytest.raises(UserError, match=r"holds more than tensors and plain values: posix\.system"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "text", [b"[" + b"[]," * 2_000_001 + b"0]", b"[" + b"0," * 2_000_001 + b"0]", b'"' + b"a" * (65 << 20) + b'"']
)
def test_json_of_millions_of_values(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UserError, match=r"a\.json is refused: "):
        run_bounded_or_raise(read_json, tmp_path / "a.json")
