"""A function in somebody's own Python file, named `FILE.py:FUNCTION` on a command line.

Its code runs, so such a name is only ever taken from the person at the terminal or from a caller, never from a file.
"""

import contextlib
import hashlib
import importlib.util
import re
import symtable
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.errors import UserError
from utils.own_imports import use_own_imports
from utils.untrusted import MAX_TEXT_BYTES, read_whole

_NAME = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)", re.DOTALL)


def names_function(name: Any) -> bool:
    """Whether `name` has the form `FILE.py:FUNCTION`."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def function_of(name: str) -> str:
    """`FUNCTION` of `FILE.py:FUNCTION`."""
    return _split(name)[1]


METHOD_FLAGS = ("prune_mode", "distill")  # whose values may be functions of one's own


def code_in(value: Any) -> list[str]:
    """The names of the form `FILE.py:FUNCTION` among the values of a flag."""
    return [each for each in (value if isinstance(value, list | tuple) else [value]) if names_function(each)]


def code_digests(flags: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the file of each method of one's own that `flags` name, by name: a run goes on with the same code only."""
    names = [name for flag in METHOD_FLAGS for name in code_in(flags.get(flag))]
    return {name: hashlib.sha256(read_whole(_split(name)[0], limit=MAX_TEXT_BYTES)).hexdigest() for name in names}


def check_function(name: str) -> None:
    """Raises UserError unless the file of `FILE.py:FUNCTION` is there and defines the function. Runs nothing of it."""
    path, function = _split(name)
    try:
        code = read_whole(path, limit=MAX_TEXT_BYTES)
        table = symtable.symtable(code, str(path), "exec")
    except OSError as error:
        raise UserError(f"{name}: {path} cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{name}: {path} {error}") from error
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{name}: {path}{_line(error)} is no Python: {getattr(error, 'msg', error)}") from error
    defined = [symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()]
    if function not in defined and b"import *" not in code:
        nearest = get_close_matches(function, defined) or [symbol for symbol in defined if not symbol.startswith("_")]
        raise UserError(f"{name}: {path} defines no {function}; it has {', '.join(nearest) or 'nothing'}")


def load_function(name: str) -> Callable[..., Any]:
    """The function of `FILE.py:FUNCTION`; the file runs once in a process. Its folder is the last place that it imports from,
    but that folders called as ours are, such as `models/`, come before ours.

    Raises UserError, with file and line, for whatever goes wrong.
    """
    check_function(name)
    path, function = _split(name)
    with naming_lines(name):
        module = _load_module(path.resolve())
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{name}: {function} is no function but {type(found).__name__}")
    return found


@contextlib.contextmanager
def naming_lines(name: str) -> Iterator[None]:
    """Turns an error of the code in the file of `name` into a UserError of one line that says where in the file it arose."""
    try:
        yield
    except Exception as error:  # it is somebody else's code
        path = _split(name)[0].resolve()
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        where = f"{path.name} line {lines[-1]}" if lines else path.name
        raise UserError(f"{name}: {where}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _split(name: str) -> tuple[Path, str]:
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise UserError(f"{name!r}: expected FILE.py:FUNCTION")
    return Path(parts["path"]), parts["function"]


def _line(error: Exception) -> str:
    return f" line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""


def _load_module(path: Path) -> ModuleType:
    """The module of a file, under a name that no import statement asks for."""
    module_name = f"_python_file_{hashlib.sha256(bytes(path)).hexdigest()[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    use_own_imports(module, path.parent)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
