import json
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_runs import write_pruned, write_quantized, write_unpruned

from reporting.gather import gather, statistic
from utils.errors import UserError


def names(groups):
    return [group.name for group in groups]


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_mean_and_sample_deviation_by_hand():
    # deviations from 93.7 are -0.6 -0.2 0.2 0.6; their squares sum to 0.8, over n - 1 = 3
    mean, deviation, n = statistic([93.1, 93.5, 93.9, 94.3])
    assert (mean, n) == (pytest.approx(93.7), 4)
    assert deviation == pytest.approx((0.8 / 3) ** 0.5)


def test_one_value_has_no_deviation():
    assert statistic([90.0]) == (90.0, None, 1)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20))
def test_mean_and_deviation_are_numpys(values):
    mean, deviation, _ = statistic(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    assert deviation == pytest.approx(np.std(values, ddof=1), abs=1e-6)


def test_runs_that_differ_in_seed_and_place_are_one_group(tmp_path):
    elsewhere = [{}, {"data_dir": "/data"}, {"workers": 8, "device": "cuda"}, {"checkpoint_interval": 5, "log_name": "other.txt"}]
    for seed, flags in enumerate(elsewhere):
        write_pruned(tmp_path / f"run-{seed}", top1=90.0 + seed, seed=seed, t_path=f"gone/teacher-{seed}/model_best.pt", **flags)
    (group,) = gather([tmp_path]).groups
    assert [record.seed for record in group.records] == [0, 1, 2, 3]
    assert group.statistic("last_top1") == (91.5, statistics.stdev([90, 91, 92, 93]), 4)
    assert group.statistic("drop").mean == 6.5


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("gamma", 0.25, "--gamma 0.25"),
        ("n_epochs", 8, "--n-epochs 8"),
        ("betas", [100.0], "--betas 100"),
        ("amp", True, "--amp"),
        ("t_path", "other/net.pt", "--t-path other/net.pt"),
    ],
)
def test_another_setting_is_another_row_that_says_so(tmp_path, flag, value, shown):
    for seed in (1, 2):
        write_pruned(tmp_path / f"usual-{seed}", top1=90.0, seed=seed, amp=False)
    write_pruned(tmp_path / "unusual", top1=10.0, seed=1, **{"amp": False, flag: value})
    groups = gather([tmp_path]).groups
    assert names(groups) == ["NGGM + HAP + KD, 0.6", f"NGGM + HAP + KD, 0.6 [{shown}]"]
    assert [group.statistic("last_top1").mean for group in groups] == [90.0, 10.0]


def test_a_setting_that_one_run_has_not_got_tells_them_apart(tmp_path):
    write_pruned(tmp_path / "new", top1=90.0, new_flag=3)
    write_pruned(tmp_path / "old", top1=90.0)
    assert names(gather([tmp_path]).groups) == ["NGGM + HAP + KD, 0.6", "NGGM + HAP + KD, 0.6 [--new-flag default]"]


def test_each_seed_may_have_a_teacher_of_its_own_but_not_another_kind_of_teacher(tmp_path):
    for seed in (1, 2):
        write_unpruned(tmp_path / f"teacher-{seed}", seed=seed)
        write_pruned(tmp_path / f"pruned-{seed}", top1=90.0, seed=seed, t_path=f"saves/teacher-{seed}/model_best.pt")
    write_unpruned(tmp_path / "short", seed=1, n_epochs=2)
    write_pruned(tmp_path / "of-short", top1=80.0, t_path="saves/short/model_best.pt")
    pruned = [group for group in gather([tmp_path]).groups if group.first.script == "pruning.py"]
    assert names(pruned) == ["NGGM + HAP + KD, 0.6", "NGGM + HAP + KD, 0.6 [--n-epochs 2 of --t-path]"]
    assert [len(group.records) for group in pruned] == [2, 1]


def test_the_same_settings_and_seed_count_once(tmp_path):
    write_pruned(tmp_path / "100", top1=10.0)
    write_pruned(tmp_path / "200", top1=90.0)
    results = gather([tmp_path])
    assert results.groups[0].statistic("last_top1") == (90.0, None, 1)
    assert results.skipped == [(tmp_path / "100", f"the same settings and seed as {tmp_path / '200'}, which counts")]


def test_times_of_different_machines_are_not_averaged(tmp_path):
    for seed, device in enumerate(("cpu, 2 threads", "NVIDIA H100")):
        edit_json(write_pruned(tmp_path / device, top1=90.0, seed=seed) / "config.json", device=device)
    (group,) = gather([tmp_path]).groups
    assert group.statistic("latency_ms") is None
    assert group.statistic("minutes") is None
    assert group.statistic("macs").n == 2
    assert group.mixed == {"device": ("NVIDIA H100", "cpu, 2 threads")}


def test_unpruned_networks_take_their_sizes_from_the_pruning_of_the_same_network(tmp_path):
    write_unpruned(tmp_path / "teacher")
    write_unpruned(tmp_path / "stranger", model="resnet56")
    write_pruned(tmp_path / "pruned", top1=90.0)
    sizes = {group.first.model: group.statistic("macs") for group in gather([tmp_path]).groups if group.label == "unpruned"}
    assert sizes["resnet20"].mean == 40551808
    assert sizes["resnet56"] is None


def test_a_run_that_measured_a_table_of_times_and_those_that_took_it_are_one_method(tmp_path):
    for seed, table in enumerate((None, "saves/0/latency_table.json")):
        write_pruned(tmp_path / str(seed), top1=90.0, seed=seed, budget="latency=0.5", budget_table=table)
    (group,) = gather([tmp_path]).groups
    assert len(group.records) == 2


def test_two_folders_of_images_are_two_datasets(tmp_path):
    for place in ("/data/cats", "/elsewhere/cats", "/data/dogs"):
        write_pruned(tmp_path / place.replace("/", "-"), top1=90.0, dataset="folder", data_dir=place, seed=len(place))
    groups = gather([tmp_path]).groups
    assert [(group.subject[0], len(group.records)) for group in groups] == [("cats", 2), ("dogs", 1)]


def test_a_quantized_network_is_named_and_measured_after_the_one_before_it(tmp_path):
    write_pruned(tmp_path / "pruned", top1=96.0)
    write_quantized(tmp_path / "quantized", top1=95.5, load_path="saves/pruned/model_best.pt")
    quantized = gather([tmp_path]).groups[-1]
    assert quantized.name == "NGGM + HAP + KD, 0.6, quantized (all, 5 bits)"
    assert quantized.statistic("drop").mean == 0.5
    assert quantized.statistic("archive_codebook_bytes").mean == 3500


def test_what_has_not_begun_is_refused_or_named(tmp_path):
    done, missing = write_pruned(tmp_path / "done", top1=90.0, seed=1), tmp_path / "missing"
    with pytest.raises(UserError, match="missing: no such folder"):
        gather([done, missing])
    results = gather([missing, done], skip_missing=True)
    assert results.skipped == [(missing, "has not begun")] and len(results.groups) == 1
    with pytest.raises(UserError, match=r"no finished run found \(.*missing: has not begun\)"):
        gather([missing], skip_missing=True)


def test_unfinished_and_foreign_folders_are_named(tmp_path):
    write_pruned(tmp_path / "whole", top1=90.0)
    (write_pruned(tmp_path / "unfinished", top1=90.0, seed=2) / "summary.json").unlink()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "pruning.txt").write_text("a log")
    results = gather([tmp_path])
    assert len(results.groups) == 1
    assert results.skipped == [
        (tmp_path / "foreign", "no run, it has no config.json"),
        (tmp_path / "unfinished", "unfinished, 4 of 4 epochs are done"),
    ]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", '{"last": '),
        ("summary.json", "[]"),
        ("summary.json", '{"last": {"top1": 90}}'),
        ("summary.json", '{"last": {"top1": NaN}, "best": {"top1": 90}}'),
        ("summary.json", '{"last": {"top1": "high"}, "best": {"top1": 90}}'),
        ("summary.json", '{"last": {"top1": 90}, "best": {"top1": 90}, "compact": {"dense": {"macs": 0}}}'),
        ("config.json", '{"flags": 3}'),
        ("config.json", '{"flags": {}, "script": "pruning.py"}'),
        ("config.json", "\x00"),
        ("metrics.jsonl", '{"split": "test", "epoch": 0, "top1": null}\n'),
        ("metrics.jsonl", "3\n"),
        ("kept_filters.json", '{"conv": 3}'),
    ],
)
def test_damaged_runs_are_named_and_the_others_counted(tmp_path, file, content):
    write_pruned(tmp_path / "whole", top1=90.0)
    damaged = write_pruned(tmp_path / "damaged", top1=90.0, seed=2)
    (damaged / file).write_text(content)
    results = gather([tmp_path])
    assert [record.folder.name for group in results.groups for record in group.records] == ["whole"]
    (skipped,) = results.skipped
    assert skipped.folder == damaged
    assert "damaged" in skipped.reason


def test_no_truncation_of_any_file_stops_a_report(tmp_path):
    write_pruned(tmp_path / "whole", top1=90.0)
    cut = write_pruned(tmp_path / "cut", top1=50.0, seed=2)
    for path in sorted(cut.iterdir()):
        content = path.read_bytes()
        for length in range(0, len(content), 97):
            path.write_bytes(content[:length])
            read = [record.folder.name for group in gather([tmp_path]).groups for record in group.records]
            # metrics may lose lines: their last one can be cut by a crash
            assert read == (["whole", "cut"] if path.suffix == ".jsonl" else ["whole"]), (path.name, length)
        path.write_bytes(content)


@pytest.mark.parametrize("make", ["nothing", "log", "foreign", "unfinished"])
def test_without_a_finished_run_there_is_no_report(tmp_path, make):
    if make == "log":
        (tmp_path / "pruning.txt").write_text("a log")
    if make == "foreign":
        (tmp_path / "photos").mkdir()
    if make == "unfinished":
        (write_pruned(tmp_path / "run", top1=90.0) / "summary.json").unlink()
    with pytest.raises(UserError, match=f"{tmp_path}: no finished run found"):
        gather([tmp_path])


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="typo: no such folder"):
        gather([tmp_path / "typo"])


def test_a_run_named_twice_counts_once(tmp_path):
    run = write_pruned(tmp_path / "run", top1=90.0)
    results = gather([run, tmp_path])
    assert len(results.groups[0].records) == 1
    assert results.skipped == []
