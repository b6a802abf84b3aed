"""Writes the table of published settings in docs/flags.md from utils/cli/recipes.json.

python docs/write_settings.py
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli.recipes import Recipe, recipes
from utils.files import write_atomic

PAGE = Path(__file__).with_name("flags.md")
BEGIN, END = "<!-- written by docs/write_settings.py -->\n", "<!-- end -->\n"
SHARED = "cifar100"  # whose flags most others have


def settings_table() -> str:
    """The table of all recipes in Markdown: name, data, networks, flags, source."""
    rows = [_row(recipe) for recipe in recipes().values()]
    return "| recipe | student by teacher, data | flags | source |\n|---|---|---|---|\n" + "".join(rows)


def _row(recipe: Recipe) -> str:
    shared = recipes()[SHARED].flags
    extends = recipe.name != SHARED and shared.items() <= recipe.flags.items()
    flags = " ".join(recipe.words(without=shared if extends else None))
    flags = f"as `{SHARED}`, and `{flags}`" if extends else f"`{flags}`"
    networks = " by ".join(filter(None, (recipe.student, recipe.teacher))) or "any"
    return f"| `{recipe.name}` | {networks}, {' '.join(recipe.datasets)} | {flags} | {recipe.source} |\n"


def page_with_table(page: str) -> str:
    """The text of the page with the table as it is now."""
    return re.sub(f"(?<={BEGIN}).*?(?={END})", lambda _: settings_table(), page, flags=re.DOTALL)


if __name__ == "__main__":
    write_atomic(PAGE, page_with_table(PAGE.read_text()).encode())
