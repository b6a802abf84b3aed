"""Flags end at the command line: below it, settings are frozen dataclasses, and nothing takes or imports a Namespace."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("utils", "models", "prune", "distill", "quantize", "deploy", "reporting")
AT_THE_COMMAND_LINE = ("utils/cli", "prune/flags.py", "distill/flags.py", "deploy/flags.py", "quantize/flags.py")
SETTINGS = ("utils.images", "utils.runs", "utils.training", "prune", "distill", "quantize", "deploy")


def below_the_command_line():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(AT_THE_COMMAND_LINE):
                yield pytest.param(path, id=name)


def uses_of_flags(source):
    """Imports of argparse, and mentions of what it gives."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name == "argparse" for alias in node.names):
            yield "import argparse"
        elif isinstance(node, ast.ImportFrom) and node.module == "argparse":
            yield "from argparse"
        elif isinstance(node, ast.Name | ast.Attribute) and getattr(node, "attr", getattr(node, "id", "")) == "Namespace":
            yield f"Namespace in line {node.lineno}"


def test_every_use_is_seen():
    source = (
        "import argparse\nfrom argparse import Namespace\ndef f(args: argparse.Namespace): pass\ndef g(args: Namespace): pass\n"
    )
    assert list(uses_of_flags(source)) == ["import argparse", "from argparse", "Namespace in line 3", "Namespace in line 4"]


@pytest.mark.parametrize("path", list(below_the_command_line()))
def test_no_flags_below_the_command_line(path):
    assert list(uses_of_flags(path.read_text())) == []


@pytest.mark.parametrize("package", SETTINGS)
def test_settings_are_frozen(package):
    module = importlib.import_module(f"{package}.settings")
    kinds = [value for value in vars(module).values() if dataclasses.is_dataclass(value) and value.__module__ == module.__name__]
    assert kinds and all(kind.__dataclass_params__.frozen for kind in kinds)
