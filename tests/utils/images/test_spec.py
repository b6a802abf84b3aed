"""What travels with a network is read back as it was, and refused in one line where somebody made it up."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import UserError
from utils.images.spec import FIELDS, ImageSpec, read_image_spec

SPEC = ImageSpec(("cat", "dog"), (24, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 1.0))
TEXT = st.text("a\n\udc80", max_size=3)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=2),
)


def test_round_trip():
    fields = SPEC.as_fields()
    assert fields == {"class_names": ["cat", "dog"], "image_size": [24, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 1.0]}
    assert read_image_spec({"other": 1, **fields}, num_classes=2) == SPEC


def test_nothing_is_known_of_an_older_file():
    assert read_image_spec({"format": 1}, num_classes=2) is None


@pytest.mark.parametrize("missing", FIELDS)
def test_some_members_without_the_others(missing):
    fields = SPEC.as_fields()
    del fields[missing]
    with pytest.raises(UserError, match=rf"but no {missing}, expected class_names, image_size, mean, std together"):
        read_image_spec(fields, num_classes=2)


def deeply_nested() -> list:
    nest: list = []
    for _ in range(10_000):
        nest = [nest]
    return nest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_names", None),
        ("class_names", "ab"),
        ("class_names", ["cat", 1]),
        ("class_names", ["cat", "d" * 1025]),
        ("class_names", ["cat", "\udc80"]),
        ("class_names", {"cat": 0, "dog": 1}),
        ("image_size", 32),
        ("image_size", [32]),
        ("image_size", [32, 0]),
        ("image_size", [32, 4097]),
        ("image_size", [32, 32.0]),
        ("image_size", [32, True]),
        pytest.param("image_size", [32, 10**5000], id="huge-side"),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, 0.5, 1.1]),
        ("mean", [0.5, 0.5, float("nan")]),
        ("mean", [0.5, 0.5, "0.5"]),
        ("mean", torch.tensor([0.5, 0.5, 0.5])),
        pytest.param("mean", 10**5000, id="huge"),
        ("mean", deeply_nested()),
        ("mean", ["x" * 10**6] * 3),
        ("std", [0.5, 0.5, 0.0]),
        ("std", [0.5, 0.5, -0.5]),
        ("std", [0.5, 0.5, 1e-30]),
        ("std", [0.5, 0.5, float("inf")]),
    ],
)
def test_a_wrong_member_is_named_in_a_short_line(name, value):
    with pytest.raises(UserError) as raised:
        read_image_spec({**SPEC.as_fields(), name: value}, num_classes=2)
    message = str(raised.value)
    assert message.startswith(f"its {name} is ") and ", expected " in message
    assert len(message) < 280 and "\n" not in message


def test_names_for_another_number_of_classes():
    with pytest.raises(UserError, match="it names 2 classes, but has 10"):
        read_image_spec(SPEC.as_fields(), num_classes=10)


@given(name=st.sampled_from(FIELDS), value=ANYTHING)
def test_whatever_a_file_says_is_taken_as_it_should_be_or_refused(name, value):
    try:
        spec = read_image_spec({**SPEC.as_fields(), name: value}, num_classes=2)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 280
    else:
        assert all(0 <= mean <= 1 for mean in spec.mean) and all(0 < std <= 1 for std in spec.std)
        assert len(spec.class_names) == 2 and min(spec.image_size) >= 1
