"""README, docs and help in plain English: phrases that a reader would stumble over have a plainer form."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("initial_train", "pruning", "quantize_encode", "export", "predict", "report")
INSTEAD = {
    r"told apart": "significantly different",
    r"\b(goes|go|went|going) on with\b": "resume, continue",
    r"\bgo(es)? on as if\b": "resumes as if",
    r"(?i)(?<!there )(?<!that )\bis no (?!longer|more|better|worse)": "is not a",
    r"\bhow to go on\b": "how to continue",
    r"\bgo(es)? on (without|from)\b": "leave out, resume from",
    r"\bhas not got\b": "lacks",
}


def stiff_phrases(text: str) -> list[str]:
    text = " ".join(text.split())
    return [f"{found[0]!r}: {plain}" for phrase, plain in INSTEAD.items() for found in re.finditer(phrase, text)]


def test_a_stiff_phrase_is_found():
    assert stiff_phrases("NGGM and PFEC are not told\napart, and --resume goes on with it.")
    assert not stiff_phrases("There is no GPU here, and it is no longer needed. The run resumes.")


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_pages_have_no_stiff_phrase(page):
    assert stiff_phrases((ROOT / page).read_text()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_no_stiff_phrase(script):
    parser = importlib.import_module(script).get_args_parser()
    texts = [action.help for action in parser._actions if action.help]
    assert len(texts) > 5
    assert stiff_phrases("\n".join(texts)) == []
