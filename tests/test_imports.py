"""Who may import whom: utils nothing of ours, models utils, the methods both but not each other, nobody an entry script."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "utils": set(),
    "models": {"utils"},
    "prune": {"models", "utils"},
    "distill": {"models", "utils"},
    "quantize": {"models", "utils"},
    "deploy": {"models", "utils"},
    "reporting": {"models", "utils", "prune", "distill"},
    "filter_pruning": {"models", "utils", "prune", "distill", "deploy", "quantize"},
}
ENTRY_SCRIPTS = {"initial_train", "pruning", "quantize_encode", "export", "predict", "report"}
OURS = {*ALLOWED, *ENTRY_SCRIPTS, "benchmarks", "tests"}


def imported_modules(source):
    """Top-level names of all that `source` imports, inside functions too; relative imports stay in their package."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def ours_that_it_imports(path):
    return imported_modules(path.read_text()) & OURS


def test_imports_are_found_wherever_they_are():
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\ndef h():\n    from i import j\n"
    assert imported_modules(source) == {"a", "c", "d", "i"}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_from_the_floors_below(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    too_high = {path.relative_to(ROOT): ours_that_it_imports(path) - ALLOWED[package] - {package} for path in files}
    assert {path: names for path, names in too_high.items() if names} == {}


@pytest.mark.parametrize("script", sorted(ENTRY_SCRIPTS))
def test_an_entry_script_imports_no_other(script):
    assert ours_that_it_imports(ROOT / f"{script}.py") <= set(ALLOWED) - {"filter_pruning"}


def test_every_package_has_its_floor():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"benchmarks"} == set(ALLOWED)
    assert {path.stem for path in ROOT.glob("*.py")} == ENTRY_SCRIPTS | {"setup"}
