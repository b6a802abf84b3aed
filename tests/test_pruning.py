"""Pruning and distilling through the entry script."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from selections import prunable_layers

from deploy import budget, latency
from models import build_model
from models.graph import channel_graph
from models.network_file import describe_network, load_network
from prune.criteria import CRITERIA, Criterion
from prune.masks import keep_count
from utils.checkpoints import load_checkpoint, save_checkpoint

TINY = ["--n-epochs", "2", "--limit-batches", "2", "--batch-size", "32", "--schedule", "--device", "cpu"]
RATES = ("--prune-rates", "0.6")
SCORING = ["--limit-batches", "2", "--batch-size", "32", "--device", "cpu"]


@pytest.fixture
def prune(trained_run, tmp_path, run_script):
    """Runs pruning.py on the trained network and gives the folder of the run."""

    def run(*flags: str, name: str = "run", rates: Sequence[str] = RATES) -> Path:
        teacher = ["--t-path", str(trained_run / "model_best.pt"), "--s-copy-t"]
        ended = run_script("pruning", *teacher, *TINY, *rates, *flags, "--save-dir", str(tmp_path), "--run-name", name)
        assert ended.status == 0, ended.errors
        return tmp_path / name

    return run


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


METHODS = {
    "pfec": ("--prune-mode", "filter-a"),
    "sfp": ("--prune-mode", "filter-l2", "--soft-prune"),
    "fpgm": ("--prune-mode", "filter-gm", "--train-form", "masked"),
    "nggm, hap": ("--prune-mode", "filter-nggm", "--samp-batches", "2", "--distill", "hap"),
    "hrank": ("--prune-mode", "filter-hrank", "--samp-batches", "1"),
    "error": ("--prune-mode", "filter-error", "--samp-batches", "1"),
    "chip": ("--prune-mode", "filter-chip", "--samp-batches", "1"),
    "random, afd and at": ("--prune-mode", "filter-r", "--distill", "afd", "at", "--betas", "200", "1000"),
    "sp, soft": ("--prune-mode", "filter-gm", "--soft-prune", "--prune-interval", "2", "--distill", "sp", "--alpha", "0"),
}


@pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS)
def test_every_checkpoint_has_its_pruned_filters_at_exact_zero(prune, flags):
    folder = prune(*flags)
    for name in ("model_best.pt", "model_last.pt"):
        file = load_network(folder / name, flag="--s-path")
        layers = prunable_layers(file.network)
        assert len(layers) == 7
        for layer in layers:
            kept = file.kept[layer.name]
            assert len(kept) == keep_count(layer.filters, 0.6)
            gone = sorted(set(range(layer.filters)) - set(kept))
            for tensor in (layer.module.weight, layer.norm.weight, layer.norm.bias):
                assert tensor[gone].count_nonzero() == 0


@pytest.fixture
def times_by_work(monkeypatch):
    """Every time that a table is made of is one for each pair of input and output channels, whatever the machine does."""

    def of_layers(runners, **_):
        pairs = {place: (int(place), int(place)) if isinstance(place, str) else place[1:] for place in runners}
        return {place: [float(inputs * outputs)] for place, (inputs, outputs) in pairs.items()}

    def of_networks(networks, images, **_):
        layers = {name: [layer for layer in net.modules() if hasattr(layer, "in_channels")] for name, net in networks.items()}
        return {name: [float(sum(layer.weight.shape[:2].numel() for layer in own))] for name, own in layers.items()}

    monkeypatch.setattr(latency, "timed_in_turn", of_layers)
    monkeypatch.setattr(latency, "RUNTIMES", {"torch": lambda network, images: network})
    monkeypatch.setattr(latency, "round_seconds", of_networks)


@pytest.mark.usefixtures("times_by_work")
def test_a_budget_of_time_is_measured_once_and_its_table_makes_the_same_choice_elsewhere(prune, tmp_path, run_script):
    options = ["--budget", "latency=0.7", "--couple-channels", "--prune-mode", "filter-a"]
    first = prune(*options, "--channel-multiple", "auto", "--budget-batch-size", "32", "--budget-threads", "1", rates=())
    table = json.loads((first / "latency_table.json").read_text())
    assert (table["runtime"], table["batch_size"], table["threads"]) == ("torch", 32, 1)
    assert table["measured"].keys() == {"predicted", "measured"} and table["measured"]["predicted"] <= 0.7
    assert json.loads((first / "summary.json").read_text())["share_of_time"] == table["measured"]
    assert table["multiple"] in (1, 2, 4, 8) and len(table["layers"]) == 8
    kept = {name: layer["kept"] for name, layer in json.loads((first / "kept_filters.json").read_text()).items()}
    assert len({len(channels) for name, channels in kept.items() if "stage_1" in name}) <= 2 and len(kept["conv_1_3x3"]) < 16

    multiple = ["--channel-multiple", str(table["multiple"])]
    other = prune(*options, *multiple, "--budget-table", str(first / "latency_table.json"), rates=(), name="other")
    assert {name: layer["kept"] for name, layer in json.loads((other / "kept_filters.json").read_text()).items()} == kept
    resumed = run_script("pruning", "--resume", str(first), "--n-epochs", "3")
    assert resumed.status == 0 and "latency by" not in resumed.output
    assert json.loads((first / "latency_table.json").read_text()) == table

    quicker = {**table, "slope": table["slope"] / 1.5}
    (tmp_path / "quicker.json").write_text(json.dumps(quicker))
    less = prune(*options, *multiple, "--budget-table", str(tmp_path / "quicker.json"), rates=(), name="less")
    fewer = json.loads((less / "kept_filters.json").read_text())
    assert sum(len(layer["kept"]) for layer in fewer.values()) < sum(map(len, kept.values()))


@pytest.mark.usefixtures("times_by_work")
def test_the_network_of_the_last_step_is_the_one_that_is_timed(prune, tmp_path):
    options = ["--budget", "latency=0.7", "--couple-channels", "--prune-mode", "filter-a", "--budget-threads", "1"]
    folder = prune(*options, "--prune-steps", "2", rates=())
    table = json.loads((folder / "latency_table.json").read_text())
    assert 0.6 < table["measured"]["predicted"] <= 0.7 and 0.6 < table["measured"]["measured"] <= 0.735
    log = (tmp_path / "pruning.txt").read_text()
    assert log.count("latency by") == 1 and "WARNING: --budget" not in log

    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps({**table, "slope": table["slope"] * 1.5}))
    options = [*options[:-2], "--budget-table", str(slower)]
    prune(*options, rates=(), name="slower")
    assert "WARNING: --budget latency=0.7: the network takes 0." in (tmp_path / "pruning.txt").read_text()


BARE = """
from torch import nn

def bare(num_classes):
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--exclude-layers conv1", "--exclude-layers conv1: no such layer: choose from 0, 2"),
        ("--prune-mode filter-a", "2: its weight is computed from other parameters"),
        ("--exclude-layers 2 --prune-mode filter-bn", "--prune-mode filter-bn: no batch norm with a weight reads 0"),
        ("--exclude-layers 2 --recalibrate-bn 1", "--recalibrate-bn 1: this network has no batch norm"),
        ("--exclude-layers 2 --t-path {teacher} --distill reviewkd", "--distill reviewkd"),
        ("--exclude-layers 0 2", "--budget latency=0.5: no filter can go"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_table_is_made(flags, message, trained_run, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr(budget, "measure_table", lambda *_, **__: pytest.fail("the measurement began"))
    (tmp_path / "nets.py").write_text(BARE)
    words = flags.format(teacher=trained_run / "model_best.pt").split()
    ended = run_script("pruning", "--s-model", f"{tmp_path / 'nets.py'}:bare", "--budget", "latency=0.5", *SCORING, *words)
    assert ended.status == 2 and message in ended.errors, ended.errors


@pytest.mark.usefixtures("times_by_work")
@pytest.mark.parametrize(("exclude", "narrowest"), [((), 16), (("--exclude-layers", "conv_1_3x3", "stage_1.*"), 32)])
def test_the_best_multiple_fits_into_the_narrowest_layer_that_is_pruned(exclude, narrowest, run_script, monkeypatch):
    asked = []
    monkeypatch.setattr(latency, "best_multiple", lambda sweep, *, narrowest: asked.append(narrowest) or 1)
    options = ["--budget", "latency=0.9", "--channel-multiple", "auto", "--prune-mode", "filter-a", *SCORING]
    ended = run_script("pruning", "--s-model", "resnet8", *options, *exclude, "--dry-run")
    assert ended.status == 0 and asked == [narrowest], ended.errors


def test_proportions_follow_from_what_each_layer_loses_alone(prune, trained_run, tmp_path, run_script):
    file = tmp_path / "layers.json"
    options = ["--t-path", str(trained_run / "model_best.pt"), "--s-copy-t", "--prune-mode", "filter-l2"]
    measured = run_script("pruning", *options, *SCORING, "--sensitivity", str(file))
    assert measured.status == 0, measured.errors
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["layers.json", "layers.png"]
    document = json.loads(file.read_text())
    assert len(document["families"]) == 7 and (document["network"], document["images"]) == ("resnet8", 360)
    for row in document["families"][::2]:  # as if these could not lose anything
        row["top1"] = [0.0] * 9
    for row in document["families"][1::2]:
        row["top1"] = [document["top1"] - 1.5 * (proportion < 0.5) for proportion in document["proportions"]]
    file.write_text(json.dumps(document))

    soft = ["--prune-mode", "filter-l2", "--soft-prune"]
    folder = prune(*soft, rates=["--prune-rates", str(file)])
    kept = json.loads((folder / "kept_filters.json").read_text()).values()
    expected = [layer["filters"] if i % 2 == 0 else layer["filters"] // 2 for i, layer in enumerate(kept)]
    assert [len(layer["kept"]) for layer in kept] == expected
    file.unlink()  # the run has its own copy
    assert run_script("pruning", "--resume", str(folder), "--n-epochs", "3").status == 0
    assert json.loads((folder / "sensitivity.json").read_text()) == document


def test_gradual_pruning_ends_where_one_step_does_and_its_best_network_is_as_small(prune):
    options = ["--prune-mode", "filter-a", "--n-epochs", "4"]
    folder = prune(*options, "--prune-steps", "3")
    kept = json.loads((folder / "kept_filters.json").read_text())
    assert all(len(layer["kept"]) == keep_count(layer["filters"], 0.6) for layer in kept.values())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best"]["epoch"] >= 1 and summary["kept_filters"] == {name: len(layer["kept"]) for name, layer in kept.items()}
    assert summary["compact"]["compact"]["parameters"] < 0.5 * summary["compact"]["dense"]["parameters"]
    log = (folder.parent / "pruning.txt").read_text()
    steps = [line.partition("step ")[2] for line in log.splitlines() if " step " in line and "filters are left" in line]
    assert [step.partition(":")[0] for step in steps] == ["2 of 3", "3 of 3"]


@pytest.mark.parametrize("more", [["--distill", "hap"], ["--distill", "afd", "--couple-channels"]], ids=["hap", "afd, coupled"])
def test_gradual_pruning_of_the_small_network_is_that_of_the_masked_one(prune, more):
    options = ["--prune-mode", "filter-a", "--n-epochs", "4", "--prune-steps", "3", "--lr", "1e-4", *more]
    folders = [prune(*options, "--train-form", form, name=form) for form in ("compact", "masked")]
    small, masked = (load_network(folder / "model_last.pt", flag="--s-path") for folder in folders)
    assert small.kept == masked.kept
    for key, value in masked.network.state_dict().items():
        if "num_batches" not in key:
            found = small.network.state_dict()[key]
            dead = (found == 1) if key.endswith("running_var") else (found == 0)  # the masked one has statistics of what is gone
            torch.testing.assert_close(torch.where(dead, value, found), value, rtol=1e-3, atol=1e-4)
    states = [torch.load(folder / "model_last.pt", weights_only=True)["resume"] for folder in folders]
    sizes = [sum(each["momentum_buffer"].numel() for each in state["optimizer"]["state"].values()) for state in states]
    assert sizes[0] < 0.7 * sizes[1]
    flops = [json.loads((folder / "summary.json").read_text())["training_flops"] for folder in folders]
    assert 0.6 * flops[1] < flops[0] < 0.95 * flops[1]  # of networks that get smaller, the teacher's share the same


def test_the_small_network_is_small_and_the_same(prune):
    folder = prune("--prune-mode", "filter-a")
    dense, small = (load_network(folder / name, flag="--s-path") for name in ("model_best.pt", "model_compact.pt"))
    assert small.compact and small.network.get_submodule("stage_3.0.conv_a").weight.shape[0] == 38
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = dense.network(images), small.network(images)
    assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["kept_filters"]["conv_1_3x3"] == 10
    assert summary["compact"]["relative_difference"] <= 1e-4
    assert summary["compact"]["compact"]["file_bytes"] == (folder / "model_compact.pt").stat().st_size


@pytest.mark.parametrize("distill", ["none", "hap", "sp"])
def test_training_the_small_network_is_training_the_masked_one(prune, distill):
    method = ("--prune-mode", "filter-gm", "--distill", distill)
    masked, compact = (metrics_of(prune(*method, "--train-form", form, name=form)) for form in ("masked", "compact"))
    assert masked[0]["split"] == "train"  # later lines differ by what two steps make of rounding
    assert masked[0]["loss"] == pytest.approx(compact[0]["loss"], rel=1e-3)
    assert masked[0]["top1"] == compact[0]["top1"]


def test_a_compact_network_can_be_scored_and_pruned_further(prune, trained_run, tmp_path, run_script):
    first = prune("--prune-mode", "filter-a", name="first")
    path = str(first / "model_compact.pt")
    scored = run_script("pruning", "--evaluate", "--s-path", path, *SCORING)
    best = json.loads((first / "summary.json").read_text())["best"]["top1"]
    assert f"top1 {best:.2f}" in scored.output
    flags = ["--prune-mode", "filter-a", "--save-dir", str(tmp_path), "--run-name", "second"]
    ended = run_script("pruning", "--s-path", path, *TINY, *flags, "--prune-rates", "0.3")
    assert ended.status == 0, ended.errors
    kept = [json.loads((tmp_path / name / "kept_filters.json").read_text()) for name in ("first", "second")]
    for before, after in zip(kept[0].values(), kept[1].values(), strict=True):
        assert set(after["kept"]) < set(before["kept"])


def test_a_teacher_of_another_depth(prune, tmp_path, run_script):
    flags = [*TINY, *RATES, "--save-dir", str(tmp_path)]
    assert run_script("initial_train", "--model", "resnet20", *flags[:-4], *flags[-2:], "--run-name", "deep").status == 0
    teacher = ["--t-model", "resnet20", "--t-path", str(tmp_path / "deep" / "model_best.pt"), "--s-model", "resnet8"]
    ended = run_script("pruning", *teacher, *flags, "--distill", "afd", "hap", "--betas", "200", "700", "--run-name", "run")
    assert ended.status == 0, ended.errors
    assert load_network(tmp_path / "run" / "model_best.pt", flag="--s-path").model == "resnet8"


def test_a_teacher_of_other_classes_shows_feature_maps_alone(tmp_path, run_script):
    path = tmp_path / "seven.pt"
    description = describe_network(build_model("resnet8", num_classes=7).state_dict(), model="resnet8", num_classes=7, config={})
    save_checkpoint(
        path, {**description, "class_names": list("abcdefg"), "image_size": [32, 32], "mean": [0.1] * 3, "std": [0.3] * 3}
    )
    flags = ["--t-path", str(path), "--s-model", "resnet8", *TINY, *RATES, "--distill", "at"]
    ended = run_script("pruning", *flags, "--save-dir", str(tmp_path), "--run-name", "knows")
    assert ended.status == 2 and "has 7 classes, but --dataset digits has 10" in ended.errors
    ended = run_script("pruning", *flags, "--alpha", "0", "--save-dir", str(tmp_path), "--run-name", "looks")
    assert ended.status == 0, ended.errors
    assert "teacher resnet8: knows 7 other classes" in ended.output
    assert load_network(tmp_path / "looks" / "model_best.pt", flag="--s-path").images.mean == (0.1,) * 3


def test_excluded_layers_and_multiples(prune):
    folder = prune("--prune-mode", "filter-a", "--exclude-layers", "conv_1_3x3", "--channel-multiple", "8")
    kept = {name: len(layer["kept"]) for name, layer in json.loads((folder / "kept_filters.json").read_text()).items()}
    assert kept["conv_1_3x3"] == 16
    assert {count for name, count in kept.items() if name.startswith("stage_")} == {8, 16, 40}


@pytest.mark.parametrize("flags", [(), ("--soft-prune", "--prune-mode", "filter-l2"), ("--train-form", "masked")])
def test_coupled_channels_within_a_budget(prune, run_script, flags):
    options = ["--budget", "macs=0.5", "--couple-channels", "--allocation", "global", "--prune-mode", "filter-a", *flags]
    folder = prune(*options, rates=())
    summary = json.loads((folder / "summary.json").read_text())["compact"]
    assert 0.48 <= summary["compact"]["macs"] / summary["dense"]["macs"] <= 0.5
    assert summary["relayouts"] == 0 and summary["relative_difference"] < 1e-5
    kept = load_network(folder / "model_best.pt", flag="--s-path").kept
    assert kept["stage_1.0.conv_b"] == kept["conv_1_3x3"]
    ended = run_script("pruning", "--resume", str(folder), "--n-epochs", "3")
    assert ended.status == 0, ended.errors


def test_a_criterion_without_one_score_a_filter_ends_the_run_before_anything_is_pruned(
    trained_run, tmp_path, run_script, monkeypatch
):
    monkeypatch.setitem(CRITERIA, "filter-new", Criterion("filter-new", "New", lambda weight: weight.abs().sum(1), frozenset()))
    teacher = ["--t-path", str(trained_run / "model_best.pt"), "--s-copy-t", "--prune-mode", "filter-new"]
    ended = run_script("pruning", *teacher, *TINY, *RATES, "--save-dir", str(tmp_path), "--run-name", "run")
    assert ended.status == 2
    assert ended.errors.strip().endswith(
        "conv_1_3x3: filter-new gives scores of shape (16, 3, 3), expected one finite number a filter, (16,)"
    )
    assert not list(tmp_path.glob("run/*.pt"))


def old_soft_state(folder: Path) -> None:
    """Turns the saved state of a soft pruning into one of the version that cleared BN biases, and nothing before epoch 0."""
    checkpoint = load_checkpoint(folder / "model_last.pt")
    hooks = checkpoint["resume"]["hooks"]
    hooks["just_pruned"] = hooks.pop("just_cleared")
    save_checkpoint(folder / "model_last.pt", checkpoint)


def test_a_soft_pruning_of_an_older_version_does_not_go_on_as_another_method(prune, run_script):
    folder = prune("--prune-mode", "filter-l2", "--soft-prune")
    old_soft_state(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    ended = run_script("pruning", "--resume", str(folder), "--n-epochs", "3")
    assert ended.status == 2
    assert f"--resume {folder}: an older version began it, whose soft pruning was another method; start it anew" in ended.errors
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before


def test_recalibrated_statistics_are_in_every_file_and_training_does_not_see_them(prune):
    method = ("--prune-mode", "filter-l2", "--soft-prune")
    plain, recalibrated = prune(*method, name="plain"), prune(*method, "--recalibrate-bn", "2", name="recalibrated")
    lines = [metrics_of(folder) for folder in (plain, recalibrated)]
    assert [line["loss"] for line in lines[0][::2]] == [line["loss"] for line in lines[1][::2]]
    assert all(first["loss"] != second["loss"] for first, second in zip(lines[0][1::2], lines[1][1::2], strict=True))
    for name in ("model_last.pt", "model_best.pt", "model_compact.pt"):
        states = [load_checkpoint(folder / name) for folder in (plain, recalibrated)]
        assert states[1]["state_dict"]["bn_1.num_batches_tracked"] == 2
        assert not torch.equal(*(state["state_dict"]["bn_1.running_mean"] for state in states))
    states = [load_checkpoint(folder / "model_last.pt")["resume"]["objective"] for folder in (plain, recalibrated)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    scores = [json.loads((folder / "before_training.json").read_text())["pruned"]["loss"] for folder in (plain, recalibrated)]
    assert scores[0] != scores[1]


def test_hard_pruning_is_recalibrated_in_either_form(prune):
    method = ("--prune-mode", "filter-gm", "--recalibrate-bn", "1")
    for form in ("masked", "compact"):
        state = load_checkpoint(prune(*method, "--train-form", form, name=form) / "model_best.pt")["state_dict"]
        assert state["bn_1.num_batches_tracked"] == 1


def test_without_rates_no_filter_is_pruned_and_another_architecture_may_teach(trained_run, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr("prune.choice.mean_gradients", None)  # no gradient pass where nothing is scored
    size = ["--n-epochs", "1", "--limit-batches", "1", "--batch-size", "32", "--schedule", "--device", "cpu"]
    networks = ["--t-path", str(trained_run / "model_best.pt"), "--s-model", "resnet20", "--distill", "kd"]
    ended = run_script("pruning", *networks, *size, "--save-dir", str(tmp_path), "--run-name", "run")
    assert ended.status == 0, ended.errors
    assert "no filter is pruned, the network stays whole" in ended.output
    assert "model_compact.pt is the whole network" in ended.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["compact"]["compact"]["parameters"] == summary["compact"]["dense"]["parameters"]
    assert "CUDA_HOME" not in ended.errors
    planned = run_script("pruning", *networks, *size, "--dry-run")
    lines = [line for line in planned.output.splitlines() if not line.startswith("WARNING: ")]
    assert lines[0].startswith("no filter is pruned")


@pytest.mark.parametrize("distill", ["none", "hap"])
def test_a_run_traces_its_network_once_for_each_method(prune, distill, monkeypatch):
    traced = []
    trace = channel_graph.trace_network
    monkeypatch.setattr(
        channel_graph, "trace_network", lambda network, method, **given: traced.append(method) or trace(network, method, **given)
    )
    folder = prune("--budget", "macs=0.5", "--couple-channels", "--prune-mode", "filter-a", "--distill", distill, rates=())
    assert (folder / "model_compact.pt").exists()
    assert sorted(traced) == ["forward", "outputs"]
