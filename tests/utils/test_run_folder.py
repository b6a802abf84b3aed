"""What may lie in a run's folder, and which names it may have."""

import pytest

from utils.errors import UserError
from utils.run_folder import check_save_dir, read_config


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

    @pytest.mark.parametrize("name", ["a/b", "..", ".", "", "/tmp", "x" * 300])
    def test_names_that_are_none(self, name, tmp_path):
        with pytest.raises(UserError, match="--run-name"):
            check_save_dir(str(tmp_path), name=name, log_name="log.txt")
        with pytest.raises(UserError, match="--log-name"):
            check_save_dir(str(tmp_path), name=None, log_name=name)

    def test_log_and_run_of_one_name(self, tmp_path):
        with pytest.raises(UserError, match="--log-name same"):
            check_save_dir(str(tmp_path), name="same", log_name="same")

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "saves").write_text("")
        for save_dir in (tmp_path / "saves", tmp_path / "saves" / "deeper"):
            with pytest.raises(UserError, match=f"--save-dir {save_dir}"):
                check_save_dir(str(save_dir), name=None, log_name="log.txt")
