"""What messages show of files that others wrote: one line, of bounded length, that any terminal takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import MAX_SHOWN, printable, shown

ANY_TEXT = st.text(st.characters(codec=None), max_size=500)


def test_ordinary_text_is_as_it_was():
    assert printable("stage_1.0.conv_a keeps 3 of 16, größer") == "stage_1.0.conv_a keeps 3 of 16, größer"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb", "a\\nb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\ud800", "\\ud800"),
        ("\u202egpj", "\\u202egpj"),
        ("\u2028", "\\u2028"),
    ],
)
def test_what_moves_a_terminal_is_escaped(text, expected):
    assert printable(text) == expected


@given(ANY_TEXT, st.integers(4, 300))
def test_any_text_is_one_line_within_the_limit(text, limit):
    line = printable(text, limit)
    assert len(line) <= limit
    assert len(line.splitlines()) <= 1
    line.encode()


def test_a_long_text_keeps_its_ends():
    assert printable("a" * 500 + "z" * 500, 12) == "aaaaaa...zzz"


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner),
)


@given(nested)
def test_any_value_is_one_line_within_the_limit(value):
    line = shown(value)
    assert len(line) <= MAX_SHOWN
    assert len(line.splitlines()) <= 1
    line.encode()


def test_values_look_as_in_python():
    assert shown("resnet21") == "'resnet21'"
    assert shown(["resnet20"]) == "['resnet20']"
    assert shown(10**12) == "1000000000000"


def test_a_value_that_contains_itself_or_grows_without_end_is_shown_at_once():
    endless: list = []
    endless.append(endless)
    doubled: list = [0]
    for _ in range(200):
        doubled = [doubled, doubled]
    assert len(shown(endless)) <= MAX_SHOWN and len(shown(doubled)) <= MAX_SHOWN
    assert len(shown(10**4000)) <= MAX_SHOWN
    assert shown([10**5000]) == "[<a number of 16610 bits>]"
