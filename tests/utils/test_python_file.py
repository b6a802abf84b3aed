"""Functions of people's own files: checked without running anything, loaded once, errors in one line with file and line."""

import sys

import pytest

from utils.errors import UserError
from utils.python_file import check_function, function_of, load_function, names_function


def write(folder, text, name="nets.py"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["nets.py:small", "../a folder/nets.py:Net", "/tmp/x:y/nets.py:f_1"])
def test_names_of_functions_are_told_from_others(name):
    assert names_function(name)


@pytest.mark.parametrize(
    "name", ["nets.py", "nets.py:", "nets:small", "resnet20", "timm/resnet18", ".py:f", "nets.py:a-b", None, 3]
)
def test_other_names_are_none_of_functions(name):
    assert not names_function(name)


def test_a_name_says_its_function():
    assert function_of("/tmp/x:y/nets.py:f_1") == "f_1"


def test_checking_runs_nothing(tmp_path):
    marker = tmp_path / "marker"
    path = write(tmp_path, f"open({str(marker)!r}, 'w')\nif True:\n    def small(): pass\nfrom torch.nn import Linear as layer\n")
    check_function(f"{path}:small")
    check_function(f"{path}:layer")
    assert not marker.exists()
    load_function(f"{path}:small")
    assert marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def smaller(): pass\n", "defines no small; it has smaller"),
        ("def f():\n    def small(): pass\n", "defines no small; it has f"),
        ("x = 1\ndef small(:\n", "line 2 is no Python"),
        ("", "it has nothing"),
    ],
)
def test_what_is_not_there_is_said_before_anything_runs(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        check_function(f"{write(tmp_path, text)}:small")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.py cannot be read: No such file"):
        check_function(f"{tmp_path / 'gone.py'}:small")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nraise KeyError('width')\ndef small(): pass\n", r"nets\.py line 2: KeyError: 'width'"),
        ("import no_such_module\ndef small(): pass\n", r"nets\.py line 1: ModuleNotFoundError"),
        ("small = 3\n", "small is no function but int"),
    ],
)
def test_an_error_in_the_file_is_one_line_that_says_where(tmp_path, text, message):
    before = set(sys.modules)
    with pytest.raises(UserError, match=message) as raised:
        load_function(f"{write(tmp_path, text)}:small")
    assert "\n" not in str(raised.value)
    if "int" not in message:
        assert not {name for name in set(sys.modules) - before if name.startswith("_python_file")}


def test_a_file_runs_once_and_imports_its_neighbours(tmp_path):
    write(tmp_path, "WIDTH = 7\n", name="neighbour_of_nets.py")
    path = write(tmp_path, "from neighbour_of_nets import WIDTH\ndef small(): return WIDTH\nlarge = small\n")
    assert load_function(f"{path}:small")() == 7
    assert load_function(f"{path}:small") is load_function(f"{path}:large")


@pytest.fixture
def project(tmp_path):
    """A project whose `models/` and `utils/` are called as ours, with imports at once, relative, and while it runs."""
    write(tmp_path, "def double(x): return 2 * x\n", name="helper_of_nets.py")
    for name in ("models", "utils"):
        (tmp_path / name).mkdir()
    write(tmp_path / "models", "from .tiny import net\n", name="__init__.py")
    write(tmp_path / "models", "import utils.files\ndef net(): return utils.files.WIDTH\n", name="tiny.py")
    write(tmp_path / "models", "WIDTH = 5\n", name="late.py")
    write(tmp_path / "utils", "from helper_of_nets import double\nWIDTH = double(4)\n", name="files.py")
    late = "def late():\n    from models.late import WIDTH\n    return WIDTH\n"
    return write(tmp_path, f"import json\nfrom models import net\nfrom models.tiny import net as same\n{late}")


def test_its_models_and_utils_mean_its_own_files(project):
    import models
    import utils.files

    ours = models.__file__, utils.files.__file__
    assert load_function(f"{project}:net")() == 8
    assert load_function(f"{project}:net") is load_function(f"{project}:same")
    assert load_function(f"{project}:late")() == 5
    assert (sys.modules["models"].__file__, sys.modules["utils.files"].__file__) == ours
    assert load_function(f"{project}:net").__module__ in sys.modules


def test_a_folder_without_python_takes_no_place_of_ours(tmp_path):
    import models

    (tmp_path / "models").mkdir()
    assert load_function(f"{write(tmp_path, 'from models import build_model')}:build_model") is models.build_model
