"""The moving average of a network's weights."""

import copy
import json

import pytest
import torch
from torch import nn

from models.network_file import load_network
from prune.compact import check_pruned_zeros
from utils.checkpoints import load_checkpoint
from utils.training.averaging import WeightAverage


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_averages_by_hand():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 8.0)
    average = WeightAverage(net, 0.75)
    for value, expected in ((0.0, 6.0), (0.0, 4.5), (8.5, 5.5)):
        nn.init.constant_(net.weight, value)
        average.update()
        with average.swapped():
            assert net.weight.item() == expected
        assert net.weight.item() == value


def test_statistics_are_averaged_and_counters_are_not():
    net = network()
    average = WeightAverage(net, 0.5)
    with torch.no_grad():
        net[1].running_mean.fill_(4.0)
        net[1].num_batches_tracked.fill_(7)
    average.update()
    assert [buffer.tolist() for buffer in average.buffers(net)] == [[2.0, 2.0], [1.0, 1.0]]
    with average.swapped():
        assert net[1].running_mean.tolist() == [2.0, 2.0] and net[1].num_batches_tracked == 7


def test_what_is_zero_in_every_step_is_zero_in_the_average():
    net = network()
    with torch.no_grad():
        net[0].weight[0] = 0
    average = WeightAverage(net, 0.9)
    for _ in range(5):
        with torch.no_grad():
            net[0].weight[1] += 1
        average.update()
    with average.swapped():
        assert net[0].weight[0].eq(0).all() and net[0].weight[1].ne(0).all()


def test_state_round_trip_and_the_state_of_another_network():
    net = network()
    average, other = WeightAverage(net, 0.5), WeightAverage(copy.deepcopy(net), 0.5)
    nn.init.ones_(net[0].weight)
    average.update()
    other.load_state_dict(average.state_dict())
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match=r"the average of 0.weight has shape \(2, 2\), not \(2, 3\)"):
        WeightAverage(nn.Sequential(nn.Linear(3, 2)), 0.5).load_state_dict(average.state_dict())
    with pytest.raises(KeyError):
        WeightAverage(nn.Sequential(nn.Linear(3, 2)), 0.5).load_state_dict({})


# ---- through the entry scripts -----------------------------------------------------------------------------------------

TINY = ["--batch-size", "32", "--limit-batches", "2", "--device", "cpu", "--schedule", "--ema", "0.5"]


def last_line(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def triples(output):
    lines = output.splitlines()
    return zip(lines, lines[1:], lines[2:], strict=False)


@pytest.mark.parametrize("ships", ["average", "trained"])
def test_both_are_scored_and_saved_and_one_is_shipped(tmp_path, run_script, ships):
    flags = ["--model", "resnet8", *TINY, "--n-epochs", "1", "--save-dir", str(tmp_path), "--run-name", "run", "--ships", ships]
    ended = run_script("initial_train", *flags)
    assert ended.status == 0, ended.errors
    folder, other = tmp_path / "run", {"average": "trained", "trained": "average"}[ships]
    shipped, beside = load_checkpoint(folder / "model_last.pt"), load_checkpoint(folder / f"model_{other}.pt")
    average = shipped["resume"]["average"]
    trained = {name.removeprefix("network."): value for name, value in shipped["resume"]["objective"].items()}
    states = {"average": average, "trained": trained}
    for kind, checkpoint in ((ships, shipped), (other, beside)):
        for name, value in checkpoint["state_dict"].items():
            if value.is_floating_point():
                assert torch.equal(value, states[kind][name]), (kind, name)
    line = last_line(folder)
    assert line["top1"] == shipped["metrics"]["top1"] and line[f"{other}_loss"] == beside["metrics"]["loss"]
    above, below, row = next(lines for lines in triples(ended.output) if lines[2].lstrip().startswith("1/1 "))
    heading = {"average": " EMA", "trained": " no EMA"}[other]
    end = above.index(heading) + len(heading)  # of the column
    assert below[:end].endswith(" top1") and row[:end].endswith(f" {line[f'{other}_top1']:.2f}")


def test_a_pruned_average_is_pruned_and_goes_on_bit_for_bit(tmp_path, run_script, trained_run):
    teacher = ["--t-path", str(trained_run / "model_best.pt"), "--s-copy-t", "--prune-rates", "0.5", "--prune-mode", "filter-a"]

    def prune(name, *, epochs):
        flags = [*teacher, *TINY, "--n-epochs", str(epochs), "--save-dir", str(tmp_path), "--run-name", name]
        ended = run_script("pruning", *flags)
        assert ended.status == 0, ended.errors
        return tmp_path / name

    whole, parts = prune("whole", epochs=2), prune("parts", epochs=1)
    ended = run_script("pruning", "--resume", str(parts), "--n-epochs", "2")
    assert ended.status == 0, ended.errors
    for name in ("model_last.pt", "model_trained.pt"):
        expected, found = (load_checkpoint(folder / name)["state_dict"] for folder in (whole, parts))
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
    file = load_network(whole / "model_last.pt", flag="--s-path")  # checks that what is not kept is 0
    assert len(file.kept["conv_1_3x3"]) == 8
    assert json.loads((whole / "summary.json").read_text())["compact"]["relative_difference"] < 1e-5


@pytest.mark.parametrize("ships", ["average", "trained"])
def test_an_average_has_the_filters_of_every_step_that_pruning_takes(tmp_path, run_script, trained_run, ships):
    teacher = ["--t-path", str(trained_run / "model_best.pt"), "--s-copy-t", "--prune-rates", "0.5", "--prune-mode", "filter-a"]
    flags = [*TINY, "--n-epochs", "4", "--prune-steps", "3", "--ships", ships, "--save-dir", str(tmp_path), "--run-name", "run"]
    ended = run_script("pruning", *teacher, *flags)
    assert ended.status == 0, ended.errors
    other = {"average": "trained", "trained": "average"}[ships]
    for name in ("model_best.pt", "model_last.pt", f"model_{other}.pt"):
        checkpoint = load_checkpoint(tmp_path / "run" / name)
        assert len(checkpoint["kept"]["conv_1_3x3"]) == 8
        check_pruned_zeros(checkpoint["state_dict"], checkpoint["kept"])
    check_pruned_zeros(load_checkpoint(tmp_path / "run" / "model_last.pt")["resume"]["average"], checkpoint["kept"])
    words = ["--load-path", str(tmp_path / "run" / "model_best.pt"), "--limit-batches", "1", "--device", "cpu", "--dry-run"]
    assert run_script("quantize_encode", *words).status == 0
