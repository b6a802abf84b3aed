"""Files that survive full disks, crashes, damage and strangers."""

import copy
import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import stat
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from utils import files
from utils.checkpoints import digest, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.files import append_line, read_json, remove_partial_files, write_atomic

CHECKPOINT = {
    "format": 1,
    "model": "resnet20",
    "state_dict": {"weight": torch.linspace(-1, 1, 64).view(4, 16), "steps": torch.tensor(7), "empty": torch.zeros(0, 3)},
    "metrics": {"top1": 93.25, "best": None, "done": True},
    "kept": {"conv": [0, 2, 3]},
}


@pytest.fixture
def checkpoint_path(tmp_path) -> Path:
    path = tmp_path / "model.pt"
    save_checkpoint(path, CHECKPOINT)
    return path


def failing(error: int):
    def fail(*args, **keywords):
        raise OSError(error, os.strerror(error))

    return fail


class FullFile(io.BytesIO):
    """A file that takes the first half of what is written and then finds the disk full."""

    def __init__(self, handle: int, mode: str):
        super().__init__()
        self.handle = handle

    def fileno(self) -> int:
        return self.handle

    def write(self, data) -> int:
        os.write(self.handle, bytes(data[: len(data) // 2]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        if not self.closed:
            os.close(self.handle)
        super().close()


class TestWriteAtomic:
    def test_replaces_the_whole_content(self, tmp_path):
        path = tmp_path / "a.json"
        write_atomic(path, b"a long first content")
        write_atomic(path, b"short")
        assert path.read_bytes() == b"short"
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]

    def test_gives_the_permissions_that_the_umask_leaves(self, tmp_path):
        before = os.umask(0o027)
        try:
            write_atomic(tmp_path / "a", b"")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640

    @pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT])
    @pytest.mark.parametrize("step", ["files.tempfile.mkstemp", "os.fchmod", "os.fsync", "os.replace", "os.fdopen"])
    def test_failing_at_any_step_leaves_the_old_file(self, step, error, tmp_path, monkeypatch):
        path = tmp_path / "model_last.pt"
        write_atomic(path, b"the last good state")
        owner = files.tempfile if "tempfile" in step else os
        monkeypatch.setattr(owner, step.rpartition(".")[2], failing(error))
        with pytest.raises(UserError) as raised:
            write_atomic(path, b"the next state")
        monkeypatch.undo()
        assert str(raised.value) == f"cannot write {path}: {os.strerror(error)}"
        assert path.read_bytes() == b"the last good state"
        assert [entry.name for entry in tmp_path.iterdir()] == ["model_last.pt"]

    def test_a_disk_that_fills_in_the_middle_of_the_write(self, tmp_path, monkeypatch):
        path = tmp_path / "model_last.pt"
        write_atomic(path, b"the last good state")
        monkeypatch.setattr(os, "fdopen", FullFile)
        with pytest.raises(UserError, match="No space left on device"):
            write_atomic(path, b"the next state")
        assert path.read_bytes() == b"the last good state"
        assert [entry.name for entry in tmp_path.iterdir()] == ["model_last.pt"]

    def test_an_interrupt_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a"
        write_atomic(path, b"old")

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new")
        assert path.read_bytes() == b"old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["a"]

    def test_is_on_the_disk_before_it_is_renamed(self, tmp_path, monkeypatch):
        calls = []
        for name in ("fsync", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
        write_atomic(tmp_path / "a", b"new")
        assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder

    def test_leftovers_of_a_killed_writer_are_cleared(self, tmp_path):
        (tmp_path / f"{files.TEMPORARY_PREFIX}model_last.pt-x7").write_bytes(b"half")
        (tmp_path / "model_last.pt").write_bytes(b"whole")
        remove_partial_files(tmp_path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["model_last.pt"]


class TestAppendLine:
    def test_lines_of_many_processes_stay_whole(self, tmp_path):
        path = tmp_path / "log.txt"
        context = multiprocessing.get_context("fork")
        writers = [context.Process(target=_append_many, args=(path, letter)) for letter in "abcd"]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        lines = path.read_text().splitlines()
        assert sorted(lines) == sorted(letter * 3000 for letter in "abcd" for _ in range(50))

    @pytest.mark.parametrize("step", ["open", "write", "fsync"])
    def test_failure_is_one_clear_error(self, step, tmp_path, monkeypatch):
        monkeypatch.setattr(os, step, failing(errno.ENOSPC))
        with pytest.raises(UserError) as raised:
            append_line(tmp_path / "metrics.jsonl", "{}", durable=True)
        assert str(raised.value) == f"cannot write {tmp_path / 'metrics.jsonl'}: No space left on device"

    def test_a_line_that_did_not_fit_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "write", lambda handle, data: len(data) - 1)
        with pytest.raises(UserError, match="No space left on device"):
            append_line(tmp_path / "metrics.jsonl", "{}")


def _append_many(path: Path, letter: str) -> None:
    for _ in range(50):
        append_line(path, letter * 3000)


class TestDigest:
    def test_does_not_depend_on_the_order_of_names_or_the_layout_in_memory(self):
        weight = torch.arange(6.0).view(2, 3)
        turned = weight.t().contiguous().t()
        assert digest({"a": weight, "b": 1}) == digest({"b": 1, "a": turned})

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            (torch.tensor([0.0]), torch.tensor([-0.0])),
            (torch.zeros(2, 3), torch.zeros(3, 2)),
            (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
            (torch.tensor([float("nan")]), torch.tensor([1.0])),
            ([1, 2], [12]),
            (["a", "b"], ["b", "a"]),
            ([[1], 2], [1, [2]]),
            ({"a": {"b": 1}}, {"a": 1, "b": 1}),
            (1, True),
            (1, "1"),
            (None, "None"),
        ],
    )
    def test_tells_values_apart(self, left, right):
        assert digest({"value": left}) != digest({"value": right})


class TestCheckpoint:
    def test_round_trip(self, checkpoint_path):
        loaded = load_checkpoint(checkpoint_path)
        assert loaded.keys() == CHECKPOINT.keys()
        assert digest(loaded) == digest(CHECKPOINT)

    def test_torch_alone_can_read_it(self, checkpoint_path):
        assert torch.load(checkpoint_path, weights_only=True)["kept"] == {"conv": [0, 2, 3]}

    def test_size_does_not_tell_where_equal_values_came_from(self, tmp_path):
        state = OrderedDict(CHECKPOINT["state_dict"])
        state._metadata = OrderedDict({"": {"version": 1}})
        shared = {**CHECKPOINT, "state_dict": state, "config": {"kept": CHECKPOINT["kept"], "model": CHECKPOINT["model"]}}
        save_checkpoint(tmp_path / "first.pt", shared)
        read = load_checkpoint(tmp_path / "first.pt")
        read["config"] = {"".join(key): copy.deepcopy(value) for key, value in read["config"].items()}
        read["config"]["model"] = "".join(list(read["model"]))
        assert read["state_dict"]._metadata == state._metadata
        save_checkpoint(tmp_path / "second.pt", read)
        pickles = [zipfile.ZipFile(tmp_path / f"{name}.pt").read("archive/data.pkl") for name in ("first", "second")]
        assert pickles[0] == pickles[1]

    def test_no_flipped_bit_goes_unseen(self, checkpoint_path):
        whole, expected = checkpoint_path.read_bytes(), digest(CHECKPOINT)
        source, refused = random.Random(0), 0
        for _ in range(600):
            damaged = bytearray(whole)
            position = source.randrange(8 * len(whole))
            damaged[position // 8] ^= 1 << position % 8
            checkpoint_path.write_bytes(damaged)
            try:
                loaded = load_checkpoint(checkpoint_path)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
            else:  # a bit that carries nothing, such as a date in the container
                assert digest(loaded) == expected
        assert refused > 300

    def test_every_flipped_bit_of_a_weight_is_refused(self, checkpoint_path):
        whole = checkpoint_path.read_bytes()
        weight = CHECKPOINT["state_dict"]["weight"].numpy().tobytes()
        start = whole.index(weight)
        for bit in range(0, 8 * len(weight), 37):
            damaged = bytearray(whole)
            damaged[start + bit // 8] ^= 1 << bit % 8
            checkpoint_path.write_bytes(damaged)
            with pytest.raises(UserError, match="damaged"):
                load_checkpoint(checkpoint_path)

    @pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.7, 0.99])
    def test_truncated(self, part, checkpoint_path):
        whole = checkpoint_path.read_bytes()
        checkpoint_path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(UserError, match=r"--t-path .*model\.pt: ") as raised:
            load_checkpoint(checkpoint_path, flag="--t-path")
        assert "\n" not in str(raised.value)

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match=r"--t-path .*gone\.pt: no such file"):
            load_checkpoint(tmp_path / "gone.pt", flag="--t-path")

    def test_a_folder(self, tmp_path):
        with pytest.raises(UserError, match=f"--t-path {tmp_path}: cannot be read: "):
            load_checkpoint(tmp_path, flag="--t-path")

    def test_without_its_digest(self, tmp_path):
        torch.save(CHECKPOINT, tmp_path / "model.pt")
        with pytest.raises(UserError, match="SHA-256"):
            load_checkpoint(tmp_path / "model.pt")

    def test_bare_state_dict_has_no_digest(self, tmp_path):
        torch.save(CHECKPOINT["state_dict"], tmp_path / "model.pt")
        assert load_checkpoint(tmp_path / "model.pt").keys() == CHECKPOINT["state_dict"].keys()

    def test_newer_format_is_refused_by_name(self, tmp_path):
        save_checkpoint(tmp_path / "model.pt", {**CHECKPOINT, "format": 2})
        with pytest.raises(UserError, match=r"checkpoint format 2 is newer than what this version reads \(1\)"):
            load_checkpoint(tmp_path / "model.pt")

    def test_no_mapping(self, tmp_path):
        torch.save([torch.zeros(2)], tmp_path / "model.pt")
        with pytest.raises(UserError, match="holds a list, expected a checkpoint or a state_dict"):
            load_checkpoint(tmp_path / "model.pt")

    def test_nested_without_an_end(self, tmp_path):
        endless: list = []
        endless.append(endless)
        torch.save({"format": 1, "sha256": "0" * 64, "state_dict": endless}, tmp_path / "model.pt")
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(tmp_path / "model.pt")

    def test_full_disk_leaves_the_old_one(self, checkpoint_path, monkeypatch):
        monkeypatch.setattr(os, "fdopen", FullFile)
        with pytest.raises(UserError, match="No space left on device"):
            save_checkpoint(checkpoint_path, {**CHECKPOINT, "model": "resnet56"})
        assert load_checkpoint(checkpoint_path)["model"] == "resnet20"


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


class TestStrangers:
    """Files of other people: whatever they hold is never run, and refused in one line."""

    @pytest.fixture(autouse=True)
    def _nothing_was_run(self, tmp_path, recwarn):
        yield
        assert not (tmp_path / "marker").exists()
        assert len(recwarn) == 0  # a warning would be a second line on stderr

    def refuse(self, path: Path) -> None:
        with pytest.raises(UserError) as raised:
            load_checkpoint(path, flag="--t-path")
        assert str(raised.value).startswith(f"--t-path {path}: ")
        assert "\n" not in str(raised.value)

    def test_pickle_with_code(self, tmp_path):
        (tmp_path / "model.pt").write_bytes(pickle.dumps({"state_dict": Malicious(tmp_path / "marker")}))
        self.refuse(tmp_path / "model.pt")

    def test_torch_file_with_code(self, tmp_path):
        torch.save({"state_dict": Malicious(tmp_path / "marker")}, tmp_path / "model.pt")
        self.refuse(tmp_path / "model.pt")

    def test_old_torch_file_with_code(self, tmp_path):
        torch.save({"state_dict": Malicious(tmp_path / "marker")}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
        self.refuse(tmp_path / "model.pt")

    def test_pickled_module(self, tmp_path):
        torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
        self.refuse(tmp_path / "model.pt")

    def test_compiled_module(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
            archive.writestr("model/constants.pkl", b"\x80\x02).")
            archive.writestr("model/data.pkl", b"\x80\x02}.")
            archive.writestr("model/code/__torch__.py", b"")
            archive.writestr("model/version", b"3\n")
        self.refuse(tmp_path / "model.pt")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02", b"<html>404</html>", b"\x00" * 4096])
    def test_no_torch_file(self, content, tmp_path):
        (tmp_path / "model.pt").write_bytes(content)
        self.refuse(tmp_path / "model.pt")

    def test_foreign_zip(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
            archive.writestr("readme.txt", "hello")
        self.refuse(tmp_path / "model.pt")


class TestJson:
    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot read .*config\.json: No such file"):
            read_json(tmp_path / "config.json")

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1'])
    def test_damaged(self, content, tmp_path):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"config\.json is damaged: not valid JSON"):
            read_json(tmp_path / "config.json")

    def test_round_trip(self, tmp_path):
        files.write_json(tmp_path / "a.json", {"lr": 0.1, "schedule": [1, 60]})
        assert read_json(tmp_path / "a.json") == json.loads((tmp_path / "a.json").read_text()) == {"lr": 0.1, "schedule": [1, 60]}
