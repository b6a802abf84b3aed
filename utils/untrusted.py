"""What a file of a stranger may claim, checked before anything is done that its claims could make expensive.

`torch.load(weights_only=True)` runs no code, but it decompresses what a zip file says is small, calls constructors that
allocate whatever size they are told (`bytearray`, `torch.Tensor`), and gives tensors of any size over one stored number. So a
file is opened only if it is an ordinary one; its zip directory and its pickle are read first, without doing what they say;
and what was loaded must be in proportion to the file before any of it is copied or hashed.

Only what looks at tensors imports torch.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from utils.errors import UserError, printable, shown

if TYPE_CHECKING:
    import torch

MAX_SHARING = 10  # a checkpoint's tensors, each counted where it occurs, are at most so many times as large as the file
MAX_DEPTH = 100  # of containers in containers
# What may be read into memory: of text, of a pickle, of a whole file (and of that half of the machine's memory)
MAX_TEXT_BYTES, MAX_PICKLE_BYTES, MAX_FILE_BYTES = 64 << 20, 256 << 20, 16 << 30
MAX_JSON_OBJECTS = 2_000_000  # numbers, texts, lists and objects of a text, each of which takes some 60 bytes once it is parsed
MAX_PICKLE_OPERATIONS = 500_000  # besides plain numbers
LEGACY_PICKLES = 4  # a file of torch before 1.6 begins with: magic number, version, sizes of types, content
SHOWN_NAME = 80
ZIP_BEGIN = b"PK\x03\x04"
REFUSAL = "refused, holds more than tensors and plain values"
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
FLOATS = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
PLAIN_DTYPES = frozenset((*FLOATS, "torch.int64", "torch.int32", "torch.int16", "torch.int8", "torch.uint8", "torch.bool"))
# Of all that torch would call, what dicts of plain tensors need
PLAIN_GLOBALS = frozenset(
    (
        "collections OrderedDict",
        "collections Counter",
        "torch Size",
        "torch device",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch.nn.parameter Parameter",
        *(f"torch {kind}Storage" for kind in STORAGES),
        *(dtype.replace(".", " ") for dtype in PLAIN_DTYPES),
    )
)
# What trainers write beside tensors, settings and scores: read as objects without content (`Inert`), nothing of it is called
INERT_GLOBALS = frozenset(
    (
        "argparse Namespace",
        "pathlib PosixPath",
        "pathlib WindowsPath",
        "numpy dtype",
        "numpy ndarray",
        *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    )
)
ENCODE, LATIN = "_codecs encode", "latin1"  # how Python 3 writes bytes for torch's pickle


class Inert:
    """What stands in a loaded file for an object of INERT_GLOBALS: nothing of what the file says of it is kept."""

    def __new__(cls, *_: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any):
        """The arguments of the object that it stands for are dropped."""

    def __setstate__(self, _: Any) -> None:
        """So is its state."""


def inert_globals() -> list[tuple[type, str]]:
    """As `torch.serialization.safe_globals` takes them."""
    return [(Inert, name.replace(" ", ".")) for name in sorted(INERT_GLOBALS)]


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading, never a pipe or a device, which could block or have no end. Raises OSError, UserError."""
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115, the caller closes it
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise UserError(f"is no ordinary file but a {_kind(mode)}")
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would otherwise wait for a writer


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "pipe"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"), (stat.S_ISSOCK, "socket"))
    return next(name for test, name in kinds if test(mode))


def read_whole(path: str | os.PathLike, *, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of an ordinary file of at most `limit` bytes; what it claims counts, holes included.

    Raises OSError, UserError.
    """
    with open_regular(path) as file:
        check_size(file, limit=limit)
        return file.read(min(os.fstat(file.fileno()).st_size, limit))  # Python allocates as much as it is told to read


def check_size(file: BinaryIO, *, limit: int = MAX_FILE_BYTES) -> None:
    """Raises UserError for a file that would not fit into memory, or is larger than `limit` bytes."""
    size, memory = os.fstat(file.fileno()).st_size, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = min(limit, memory // 2)
    if size > limit:
        raise UserError(f"is refused: it claims to have {size:,} bytes, at most {limit:,} are read")


def parse_json(text: bytes) -> Any:
    """The value of a JSON text that anybody may have written, in time and memory that are known before.

    Raises UserError for a text that holds too many values or nests them too deep, and ValueError for what is no JSON.
    """
    if len(text) > MAX_TEXT_BYTES or json_objects(text) > MAX_JSON_OBJECTS:
        raise UserError(f"is refused: it holds more than {MAX_JSON_OBJECTS:,} values, or {MAX_TEXT_BYTES:,} bytes")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise UserError("is damaged: nested without an end") from error
    check_nesting(value)
    return value


def json_objects(text: bytes) -> int:
    """How many values a JSON text holds at most, counted without parsing it."""
    return 1 + sum(map(text.count, (b",", b"[", b"{", b":")))


def check_before_loading(file: BinaryIO) -> None:
    """Raises UserError if loading this file of torch.save could take much more than its own size, or holds other things.

    What is no such file at all, or a damaged one, may pass, for torch to refuse, or raise what `zipfile` raises.
    """
    check_size(file)
    is_zip = file.read(len(ZIP_BEGIN)) == ZIP_BEGIN  # how torch tells them apart
    file.seek(0)
    if is_zip:
        _check_zip(file)
    else:
        content, position = file.read(MAX_PICKLE_BYTES), 0
        for _ in range(LEGACY_PICKLES):
            position = _check_pickle(content, position)
    file.seek(0)


def _check_zip(file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise UserError("refused, its content is compressed and could unfold to any size")
        size = os.fstat(file.fileno()).st_size
        if min((member.header_offset for member in members), default=0) != 0:
            raise UserError("damaged, it does not begin with its first part")
        if sum(member.file_size for member in members) > size:
            raise UserError(f"refused, its parts claim more than the {size:,} bytes of the file")
        for member in members:
            if member.filename.lower().endswith(".pkl"):
                if member.file_size >= MAX_PICKLE_BYTES:
                    raise UserError(f"refused, its part {printable(member.filename, SHOWN_NAME)} is no dict of tensors: too long")
                _check_pickle(archive.read(member), 0)


def _check_pickle(content: bytes, position: int) -> int:
    """Follows the operations of the pickle that begins at `position` without doing them, and says where it ends.

    Raises UserError for anything that no dict of plain tensors needs.
    """
    try:
        return _Pickle().follow(content, position)
    except UserError:
        raise
    except (ValueError, LookupError, MemoryError) as error:
        if len(content) >= MAX_PICKLE_BYTES:  # torch would read on
            raise UserError("refused, what comes before its tensors is too long") from error
        return position  # no pickle, or a damaged one, at which torch stops as well


class _Name(str):
    """Something that a pickle imports."""


class _InertName(_Name):
    """Something in whose place an `Inert` is put, whatever it is given."""


_MARK, _PLAIN, _MADE, _SHARED = "a mark", "a plain value", "a container or result", "one that was made before"
_INERT, _LATIN, _OLD, _BYTES = "an inert object", "the name of a code", "a plain value from before", "a text and its code"
_AGAIN = {_MADE: _SHARED, _BYTES: _SHARED, _PLAIN: _OLD}  # what something is where it occurs again
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_CONTAINERS = frozenset((*_TUPLES, "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LIST", "DICT", "FROZENSET", "BINPERSID", "PERSID"))
# What puts a plain number on the stack and does nothing else: None, True, False, whole numbers of 1, 2 and 4 bytes, floats
_PLAIN_NUMBER = re.compile(rb"[N\x88\x89]|K.|M..|J.{4}|G.{8}", re.DOTALL)
_PLAIN_NUMBERS = re.compile(rb"(?:[N\x88\x89]|K.|M..|J.{4}|G.{8})+", re.DOTALL)
_FILLING = frozenset(("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"))


class _Pickle:
    """The stack and memo of an unpickler, with what a value is in the place of the value.

    What a pickle builds is as large as its own text, as long as nothing that was made before is given to a call: a few
    bytes of text could copy it into a new mapping or a new tensor's shape.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.memo: dict[int, str] = {}
        self.marks: list[int] = []  # where they lie on the stack

    def follow(self, content: bytes, position: int) -> int:
        """Follows the pickle that begins at `position`, and gives the place behind it."""
        file = io.BytesIO(content)
        for _ in range(MAX_PICKLE_OPERATIONS):
            if numbers := _PLAIN_NUMBERS.match(content, position):
                self.stack += [_PLAIN] * len(_PLAIN_NUMBER.findall(content, position, numbers.end()))
                position = numbers.end()
            file.seek(position)
            operation, argument, _ = next(pickletools.genops(file))
            position = file.tell()
            if operation.name == "STOP":
                return position
            self._follow(operation, argument)
        raise UserError(f"{REFUSAL}: more than {MAX_PICKLE_OPERATIONS:,} operations of its pickle")

    def _follow(self, operation: pickletools.OpcodeInfo, argument: Any) -> None:
        if operation.name == "GLOBAL" and argument in INERT_GLOBALS:
            self.stack.append(_InertName(argument))
        elif operation.name == "GLOBAL" and (argument in PLAIN_GLOBALS or argument == ENCODE):
            self.stack.append(_Name(argument))
        elif operation.name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX"):
            raise UserError(f"{REFUSAL}: {printable(str(argument).replace(' ', '.'), SHOWN_NAME)}")
        elif operation.name in ("REDUCE", "NEWOBJ"):
            self._call()
        elif operation.name == "BUILD" and self.stack.pop() is _SHARED and self.stack[-1] is not _INERT:
            raise UserError(f"{REFUSAL}: a state that was used before")
        elif operation.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif operation.name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(_AGAIN.get(self.memo[argument], self.memo[argument]))
        elif operation.name == "BINUNICODE" and argument == LATIN:
            self.stack.append(_LATIN)
        elif operation.name != "BUILD":
            self._apply(operation)

    def _call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if isinstance(called, _InertName):
            return self.stack.append(_INERT)
        if called == ENCODE and arguments is not _BYTES:  # a text of the file, once: others would grow with each call
            raise UserError(f"{REFUSAL}: {ENCODE.replace(' ', '.')}")
        if not isinstance(called, _Name) or arguments is _SHARED:
            raise UserError(f"{REFUSAL}: a call")
        self.stack.append(_MADE)

    def _apply(self, operation: pickletools.OpcodeInfo) -> None:
        """Takes off the stack what the operation takes, and puts on what it puts."""
        before, taken = list(operation.stack_before), []
        if pickletools.markobject in before:
            mark = self.marks.pop()
            taken = self.stack[mark + 1 :]
            del self.stack[mark:]
            before = before[: before.index(pickletools.markobject)]
        if operation.name in _FILLING:  # the container stays where it is
            del self.stack[len(self.stack) - len(before) + 1 :]
            return
        taken += [self.stack.pop() for _ in before]
        if operation.name == "MARK":
            self.marks.append(len(self.stack))
        if len(self.marks) > MAX_DEPTH:
            raise UserError("damaged or forged, nested without an end")
        made = _MARK if operation.name == "MARK" else _MADE if operation.name in _CONTAINERS else _PLAIN
        if operation.name in _TUPLES and _SHARED in taken:
            made = _SHARED
        if operation.name == "TUPLE2" and taken == [_LATIN, _PLAIN]:
            made = _BYTES
        self.stack += [made] * len(operation.stack_after)


def check_nesting(value: Any) -> None:
    """Raises UserError for parsed JSON whose lists and objects lie too deep in each other to be those of a run."""
    layer, depth = [value], 0
    while layer:
        depth += 1
        if depth > MAX_DEPTH:
            raise UserError(f"is damaged: nested more than {MAX_DEPTH} deep")
        layer = [
            inner
            for part in layer
            if isinstance(part, dict | list)
            for inner in (part.values() if isinstance(part, dict) else part)
        ]


def check_loaded(value: Any, *, file_bytes: int) -> None:
    """Raises UserError unless `value` is a nest of mappings, sequences, plain tensors and plain values in proportion to its file.

    Tensors on the CPU in memory, of ordinary number types, each counted where it occurs, may take MAX_SHARING times the file.
    """
    import torch

    pending, parts, tensor_bytes = [(value, "", 0)], 0, 0
    while pending:
        part, name, depth = pending.pop()
        parts += 1
        if type(part) is list and _PLAIN_TYPES.issuperset(map(type, part)):
            parts, part = parts + len(part), None  # channels by the thousand, in which there is nothing to look for
        if isinstance(part, torch.Tensor):
            _check_plain(part, name)
            tensor_bytes += part.numel() * part.element_size()
        pending += [(inner, inner_name, depth + 1) for inner_name, inner in _inside(part, name)]
        if depth > MAX_DEPTH or parts + len(pending) > file_bytes:
            raise UserError("damaged or forged, nested without an end")
        if tensor_bytes > MAX_SHARING * file_bytes:
            raise UserError(
                f"refused, its tensors claim more than {MAX_SHARING} times the {file_bytes:,} bytes of the file: "
                f"{printable(name, SHOWN_NAME)} is {tuple(part.shape)}"
            )


_PLAIN_TYPES = frozenset((int, float, bool, type(None)))


def _inside(part: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(part, dict):
        for key, inner in dict.items(part):
            if not isinstance(key, str | int | float | None):
                raise UserError(f"refused, a mapping has the key {shown(key, SHOWN_NAME)}, expected names")
            yield (str(key), inner)
        attributes = getattr(part, "__dict__", {})  # of an OrderedDict; others could take the place of its methods
        if not attributes.keys() <= {"_metadata"}:
            raise UserError(f"refused, a mapping has attributes of its own: {shown(list(attributes), SHOWN_NAME)}")
        yield from attributes.items()
    elif isinstance(part, list | tuple):
        yield from ((name, inner) for inner in part)


def _check_plain(tensor: torch.Tensor, name: str) -> None:
    """Raises UserError for a tensor that is sparse, quantized, nested, without memory, or of unusual numbers."""
    import torch

    kinds = {
        "a sparse tensor": tensor.layout != torch.strided,
        "a quantized tensor": tensor.is_quantized,
        "a nested tensor": tensor.is_nested,
        "a tensor without values": tensor.device.type != "cpu",
        f"a tensor of {tensor.dtype}": str(tensor.dtype) not in PLAIN_DTYPES,
    }
    for kind, is_so in kinds.items():
        if is_so:
            raise UserError(f"refused, {printable(name, SHOWN_NAME)} is {kind}, expected a plain tensor of ordinary numbers")
