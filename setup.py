"""Builds the one package `filter_pruning`, with everything else below it: it lives beside a project's own `models` and `utils`.

The repository itself stays flat: its scripts import `models`, `prune` and so on from its folder. What is installed imports
`filter_pruning.models`, `filter_pruning.prune` and so on, written so while the package is built.
"""

import ast
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import OptionError

ROOT = Path(__file__).resolve().parent
PACKAGE = "filter_pruning"
BELOW = ("deploy", "distill", "models", "prune", "quantize", "utils")
SUFFIXES = (".py", ".json")


def rewritten(source: str) -> str:
    """`source` with every import of a package in `BELOW` as one from below `PACKAGE`. Raises ValueError for `import models.x`."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        place = getattr(node, "lineno", 0) - 1
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.partition(".")[0] in BELOW:
            lines[place] = re.sub(r"\bfrom\s+", f"from {PACKAGE}.", lines[place], count=1)
        elif isinstance(node, ast.Import) and any(alias.name.partition(".")[0] in BELOW for alias in node.names):
            raise ValueError(
                f"line {place + 1}: `import` binds the name of a package that lies elsewhere: write `from ... import`"
            )
    return "".join(lines)


class BuildPackage(build_py):
    """Copies what lies beside the package into it."""

    def run(self) -> None:
        if self.editable_mode:
            raise OptionError("an editable install would need other imports: run from the repository's folder, or pip install .")
        super().run()
        for path in sorted(path for name in BELOW for path in (ROOT / name).rglob("*") if path.suffix in SUFFIXES):
            self._place(path, Path(self.build_lib) / PACKAGE / path.relative_to(ROOT))
        for path in (ROOT / PACKAGE).rglob("*.py"):
            self._place(path, Path(self.build_lib) / path.relative_to(ROOT))

    def _place(self, path: Path, target: Path) -> None:
        self.mkpath(str(target.parent))
        text = path.read_text(encoding="utf-8")
        target.write_text(rewritten(text) if path.suffix == ".py" else text, encoding="utf-8")


setup(cmdclass={"build_py": BuildPackage})
