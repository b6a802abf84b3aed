"""A project of somebody else's whose folders are called as ours are: its `from models.net import Net` means its own files.

Its modules are loaded below a package of a name of their own, so that both are there at once, and its import statements look
there first. Only what they name in text at once is redirected: `importlib.import_module("models.net")` finds ours.
"""

import builtins
import hashlib
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent.parent
PREFIX = "_python_files_of_"


def use_own_imports(module: ModuleType, folder: Path) -> None:
    """Before `module` runs: its import statements take what `folder` has in the place of packages of ours."""
    if folder != HERE and any(_has(folder, name) for name in _ours()):
        _redirect(module, _package(folder))


def _ours() -> list[str]:
    """Names of packages and modules that a program would get from here; none where we are part of another package."""
    if HERE not in [Path(place).resolve() for place in sys.path]:
        return []
    return [path.stem for path in HERE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]


def _has(folder: Path, name: str) -> bool:
    """Whether `import name` could mean a file of the folder; one without Python in it could not."""
    return (folder / f"{name}.py").is_file() or next((folder / name).glob("*.py"), None) is not None


@cache
def _is_own(folder: Path, name: str) -> bool:
    """Whether a name means the folder's file: in the place of one of ours, or where nothing else is called so."""
    if name in sys.builtin_module_names or not _has(folder, name):
        return False
    found = None if name in _ours() else PathFinder.find_spec(name)
    places = [] if found is None else [found.origin or "", *(found.submodule_search_locations or ())]
    return not places or any(Path(place).resolve().is_relative_to(folder) for place in places if place)


def _package(folder: Path) -> str:
    """The name of the package that stands for a folder, made at its first use."""
    name = f"{PREFIX}{hashlib.sha256(bytes(folder)).hexdigest()[:16]}"
    if name not in sys.modules:
        package = ModuleType(name, f"The Python files of {folder}.")
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    return name


def _redirect(module: ModuleType, package: str) -> None:
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import_of(package)}


def _import_of(package: str) -> Callable[..., ModuleType]:
    """What an import statement calls, for the files of a package that stands for a folder."""
    folder = Path(sys.modules[package].__path__[0])

    def own_import(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: tuple[str, ...] = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level or not _is_own(folder, top):
            return builtins.__import__(name, globals, locals, fromlist, level)
        found = builtins.__import__(f"{package}.{name}", globals, locals, fromlist, 0)
        return found if fromlist else sys.modules[f"{package}.{top}"]

    return own_import


class _Finder:
    """Finds modules below packages that stand for folders."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(PREFIX):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        _redirect(module, module.__name__.partition(".")[0])
        super().exec_module(module)
