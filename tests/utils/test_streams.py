"""Standard streams that cannot be written: nothing fails by them, and the loss is known. Each case is a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BEGIN = "import os, sys; from utils.streams import *; outlive_lost_streams(); "
CLOSED = "<&- >&- 2>&-"


def python(code: str, redirection: str = "") -> subprocess.CompletedProcess[str]:
    """What `BEGIN` and `code` come to in a shell with `redirection`, which may end in a pipe to another command."""
    command = f'set -o pipefail; "$0" -c "$1" {redirection}'
    words = ["bash", "-c", command, sys.executable, BEGIN + code]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [(">/dev/full", "No space left on device"), (">&-", "it is closed"), ("| (exec <&-; sleep 1)", "Broken pipe")],
    ids=["full", "closed", "reader gone"],
)
@pytest.mark.parametrize("flush", [True, False])
def test_lost_output_fails_nothing_and_is_told_once(redirection, reason, flush):
    wait = "import time; time.sleep(0.5); "  # until the reader has gone
    code = f"{wait}print('x' * 100000, flush={flush}); print(take_losses(), take_losses(), file=sys.stderr); print('rest')"
    ended = python(code, redirection)
    assert ended.returncode == 0  # not 120 either, of a flush when Python ends
    told, again = ended.stderr.strip().rsplit(" ", 1)
    assert "'standard output': " in told
    assert reason in told
    assert again == "{}"
    assert ended.stderr.count("\n") == 1


def test_lost_standard_error_as_well():
    ended = python("print('x', file=sys.stderr); sys.stdout.write(str(take_losses()))", "2>/dev/full")
    assert ended.returncode == 0
    assert ended.stdout == "{'standard error': OSError(28, 'No space left on device')}"
    ended = python("print_error('why')", "2>/dev/full")
    assert ended.stdout == "why\n"
    assert python("print_error('why')").stderr == "why\n"


def test_whole_streams_are_as_before():
    code = "print('ü', end=''); sys.stdout.flush(); sys.stdout.buffer.write(b'bytes\\n'); print(sys.stdout.name, take_losses())"
    assert python(code).stdout == "übytes\n<stdout> {}\n"
    code = "print(sys.stdout.isatty(), sys.stdout.fileno(), sys.stdout.write_through == sys.__stdout__.write_through)"
    assert python(code).stdout == "False 1 True\n"


def test_a_text_that_the_encoding_has_not_got():
    assert python("print('\\udcff\\u2192')", "| cat").stdout == "\\udcff→\n"


def test_nothing_that_is_opened_later_gets_a_standard_descriptor(tmp_path):
    path = tmp_path / "file"
    code = f"file = open({str(path)!r}, 'w'); print('lost'); os.write(1, b'lost'); os.write(2, b'lost'); file.write('kept')"
    assert python(code, CLOSED).returncode == 0
    assert path.read_text() == "kept"


def test_a_file_that_was_opened_as_standard_output_before(tmp_path):
    path = tmp_path / "file"
    code = f"""import os, sys
file = open({str(path)!r}, 'w'); assert file.fileno() == 1
from utils.streams import *; outlive_lost_streams()
print('lost', flush=True); file.write('kept'); file.close()"""
    words = ["bash", "-c", '"$0" -c "$1" >&-', sys.executable, code]
    ended = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert path.read_text() == "kept"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_waits_for_a_reader_where_the_descriptor_would_not(unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    code = "os.set_blocking(1, False); print('x' * 1000000, flush=True); print(take_losses(), file=sys.stderr)"
    ended = python(code, "| (sleep 0.3; wc -c)")
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, "1000001", "{}\n")


def test_streams_of_somebody_else_stay(capsys):
    from utils.streams import outlive_lost_streams, take_losses

    before = sys.stdout, sys.stderr
    outlive_lost_streams()
    assert (sys.stdout, sys.stderr) == before
    assert take_losses() == {}
    assert os.fstat(0)
