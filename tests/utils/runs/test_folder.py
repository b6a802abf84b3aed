"""What may lie in a run's folder, and which names it may have."""

import os
import re
import socket
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.runs.folder import FILES, check_entries, check_save_dir, check_text_log, log_path, read_config


class TestConfig:
    def test_no_run(self, tmp_path):
        with pytest.raises(UserError, match=r"--resume .*: no config\.json there"):
            read_config(tmp_path, script="train.py")

    def test_of_another_script(self, tmp_path):
        (tmp_path / "config.json").write_text('{"script": "train.py", "flags": {}}')
        with pytest.raises(UserError, match=r"a run of train\.py, resume it with that script, not prune\.py"):
            read_config(tmp_path, script="prune.py")

    @pytest.mark.parametrize("content", ["[]", '{"flags": 1}', "{}"])
    def test_foreign(self, content, tmp_path):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"its config\.json is not that of a run"):
            read_config(tmp_path, script="train.py")


class TestCheckSaveDir:
    def test_writes_nothing(self, tmp_path):
        check_save_dir(str(tmp_path / "new" / "saves"), name="run", log_name="log.txt")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["a/b", "..", ".", "", "/tmp", "x" * 300, ".partial-run-x", "a\nb", "a\u2028b", "\udcff"])
    def test_names_that_are_none(self, name, tmp_path):
        with pytest.raises(UserError, match="--run-name"):
            check_save_dir(str(tmp_path), name=name, log_name="log.txt")
        with pytest.raises(UserError, match="--log-name"):
            check_save_dir(str(tmp_path), name=None, log_name=name)

    def test_log_and_run_of_one_name(self, tmp_path):
        with pytest.raises(UserError, match="--log-name same"):
            check_save_dir(str(tmp_path), name="same", log_name="same")

    def test_a_log_that_is_no_file(self, tmp_path):
        (tmp_path / "log.txt").symlink_to("/dev/null")
        with pytest.raises(UserError, match=r"--log-name log\.txt: .*/log\.txt is a link, expected a file"):
            check_save_dir(str(tmp_path), name=None, log_name="log.txt")

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "saves").write_text("")
        for save_dir in (tmp_path / "saves", tmp_path / "saves" / "deeper"):
            with pytest.raises(UserError, match=f"--save-dir {save_dir}"):
                check_save_dir(str(save_dir), name=None, log_name="log.txt")


def make_link(path: Path) -> None:
    (path.parent.parent / "mine").write_text("mine")
    path.symlink_to(path.parent.parent / "mine")


def make_socket(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(path))
    server.close()


class TestEntries:
    """Links and the like in the place of what a run writes; none is opened, and none of a foreign name matters."""

    OTHERS = (
        (make_link, "a link"),
        (Path.mkdir, "a folder"),
        (os.mkfifo, "a pipe"),
        (make_socket, "a device or a socket"),
    )

    @pytest.mark.parametrize(("make", "kind"), OTHERS, ids=[kind for _, kind in OTHERS])
    @pytest.mark.parametrize("name", FILES)
    def test_in_the_place_of_a_file(self, name, make, kind, tmp_path):
        (tmp_path / "run").mkdir()
        make(tmp_path / "run" / name)
        with pytest.raises(UserError, match=rf"--resume .*/run: {re.escape(name)} is {kind}, expected a file"):
            read_config(tmp_path / "run", script="train.py")

    def test_in_the_place_of_the_curves(self, tmp_path):
        (tmp_path / "log").symlink_to(tmp_path)
        with pytest.raises(UserError, match="log is a link, expected a folder"):
            check_entries(tmp_path)

    def test_a_folder_that_is_called_as_a_partial_file(self, tmp_path):
        (tmp_path / ".partial-model_last.pt-x").mkdir()
        with pytest.raises(UserError, match=r"\.partial-model_last\.pt-x is a folder"):
            check_entries(tmp_path)

    def test_what_no_run_writes_is_left_alone(self, tmp_path):
        (tmp_path / "notes").symlink_to("/nowhere")
        (tmp_path / "figures").mkdir()
        check_entries(tmp_path)


class TestTextLog:
    def test_is_new_or_one_of_runs(self, tmp_path):
        check_text_log(tmp_path / "run", "log.txt")
        for content in ("", "2026-11-25 10:00:00 run epoch 1/2\n"):
            (tmp_path / "log.txt").write_text(content)
            check_text_log(tmp_path / "run", "log.txt")

    @pytest.mark.parametrize("name", ["../log.txt", "/tmp/log.txt", "", ".", "..", ".bashrc", "a\nb", "a\x1b[2J", "x" * 300])
    def test_names_that_are_none(self, name, tmp_path):
        with pytest.raises(UserError, match="must be a plain name"):
            check_text_log(tmp_path / "run", name)

    def test_another_file_beside_the_run(self, tmp_path):
        (tmp_path / "notes.txt").write_text("# My notes, which nobody should add to\n")
        with pytest.raises(UserError, match=r"the text log that its config\.json names, 'notes\.txt', is another file there"):
            check_text_log(tmp_path / "run", "notes.txt")

    def test_links(self, tmp_path):
        (tmp_path / "mine").write_text("")
        (tmp_path / "soft").symlink_to("mine")
        os.link(tmp_path / "mine", tmp_path / "hard")
        for name, reason in (("soft", "is a link there"), ("hard", "has another name too")):
            with pytest.raises(UserError, match=reason):
                check_text_log(tmp_path / "run", name)

    def test_lies_beside_the_folder_whatever_that_is_called(self, tmp_path, monkeypatch):
        (tmp_path / "run").mkdir()
        monkeypatch.chdir(tmp_path / "run")
        expected = tmp_path / "log.txt"
        assert [log_path(folder, "log.txt").resolve() for folder in (Path(), Path("../run"), tmp_path / "run")] == [expected] * 3
