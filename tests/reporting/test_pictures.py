import io
import json

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_runs import ARCHIVE, write_pruned, write_quantized, write_unpruned

from reporting import cost_pictures, panels, pictures
from reporting.gather import gather
from reporting.naming import PICTURE_NAMES


@pytest.fixture
def groups(tmp_path):
    """Two methods, two seeds each, an unpruned and a quantized network, and gamma at three values."""
    write_unpruned(tmp_path / "teacher", top1=98.0)
    for seed, top1 in enumerate((95.0, 96.0)):
        write_pruned(tmp_path / f"hap-{seed}", top1=top1, seed=seed)
        write_pruned(tmp_path / f"random-{seed}", top1=top1 - 5, seed=seed, prune_mode="filter-r", distill=["none"])
    for gamma in (0.25, 1.0):
        write_pruned(tmp_path / f"gamma-{gamma}", top1=93.0 + gamma, gamma=gamma)
    write_quantized(tmp_path / "quantized", top1=94.0)
    return gather([tmp_path]).groups


def points(axes):
    """(x, y) of every method's first point, by its name in the legend."""
    drawn = {container.get_label(): container.lines[0] for container in axes.containers}
    drawn |= {line.get_label(): line for line in axes.lines if ": below" in line.get_label()}
    return {name.replace("\n", " "): tuple(map(float, line.get_xydata()[0])) for name, line in drawn.items()}


def dots(axes):
    """Accuracy and its interval of every method of a dot plot, the best first."""
    rows = {}
    for text, container in zip(axes.get_yticklabels(), axes.containers, strict=True):
        (segment,) = container.lines[2][0].get_segments() if container.lines[2] else [np.full((2, 2), np.nan)]
        rows[text.get_text()] = (float(container.lines[0].get_xdata()[0]), *segment[:, 0].tolist())
    return dict(reversed(rows.items()))


def test_every_picture_is_drawn_and_has_ink(groups):
    drawn = pictures.draw_pictures(groups, names=PICTURE_NAMES)
    assert [picture.name for picture in drawn] == [name for name, *_ in pictures.PICTURES]
    for picture in drawn:
        pixels = matplotlib.image.imread(io.BytesIO(picture.png), format="png")[..., :3]
        assert 0.003 < np.mean(pixels.min(axis=2) < 0.9) < 0.6, picture.name


def test_nothing_is_drawn_from_nothing(tmp_path):
    (write_unpruned(tmp_path / "teacher") / "metrics.jsonl").write_text("")
    assert pictures.draw_pictures(gather([tmp_path]).groups, names=PICTURE_NAMES) == []


def test_accuracy_is_drawn_where_it_was_measured(tmp_path):
    write_unpruned(tmp_path / "teacher", top1=98.0)
    for number, (macs, top1, mode) in enumerate([(8e6, 90.0, "filter-a"), (18e6, 96.0, "filter-a"), (18e6, 95.0, "filter-gm")]):
        folder = write_pruned(tmp_path / str(number), top1=top1, prune_mode=mode, distill=["none"], prune_rates=[macs / 40e6])
        summary = json.loads((folder / "summary.json").read_text())
        summary["compact"]["compact"]["macs"] = macs
        (folder / "summary.json").write_text(json.dumps(summary))
    (axes,) = cost_pictures.accuracy_over_macs(gather([tmp_path]).groups).axes
    assert points(axes) == {"unpruned": (40551808, 98.0), "PFEC": (8e6, 90.0), "FPGM, 0.45": (18e6, 95.0)}
    (curve,) = [container.lines[0] for container in axes.containers if container.get_label() == "PFEC"]
    assert curve.get_xydata().tolist() == [[8e6, 90.0], [18e6, 96.0]]
    (front,) = [line for line in axes.lines if line.get_label() == "on the Pareto front"]
    assert front.get_xydata().tolist() == [[8e6, 90.0], [18e6, 96.0], [40551808, 98.0]]
    low, high = axes.get_xlim()
    assert low < 8e6 < 40551808 < high


def test_methods_of_one_cost_are_rows_with_the_best_on_top(groups):
    (axes,) = cost_pictures.accuracy_over_macs(groups).axes
    rows = dots(axes)
    assert next(iter(rows)) == "NGGM + HAP + KD, 0.6" and list(rows)[-1] == "Random, 0.6"
    reach = 12.7062 * 0.5  # Student's t of one degree of freedom times the standard error of 95 and 96
    assert rows["NGGM + HAP + KD, 0.6"] == pytest.approx((95.5, 95.5 - reach, 95.5 + reach), abs=1e-3)
    assert np.isnan(rows["network, quantized (all, 5 bits)"][1])
    (unpruned,) = [line for line in axes.lines if line.get_label() == "unpruned"]
    assert list(unpruned.get_xdata()) == [98.0, 98.0]
    assert "17.6 M" in axes.get_xlabel()


def test_a_whole_network_that_was_distilled_is_a_line_as_the_unpruned_one(groups, tmp_path):
    folder = write_pruned(tmp_path / "whole", top1=98.5, prune_rates=[1.0], s_copy_t=True)
    summary = json.loads((folder / "summary.json").read_text())
    summary["compact"]["compact"]["macs"] = summary["compact"]["dense"]["macs"]
    (folder / "summary.json").write_text(json.dumps(summary))
    (axes,) = cost_pictures.accuracy_over_macs(gather([tmp_path]).groups).axes
    assert {"unpruned", "unpruned + HAP + KD"} <= {line.get_label() for line in axes.lines}
    assert "unpruned + HAP + KD" not in dots(axes)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(places):
    front = cost_pictures.pareto_front([cost_pictures.Point(None, accuracy, None, cost) for cost, accuracy in places])
    expected = {
        (cost, accuracy)
        for cost, accuracy in places
        if not any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in places)
    }
    assert [(point.cost, point.accuracy) for point in front] == sorted(expected)


def test_bytes_are_those_of_the_smallest_file(groups):
    (axes,) = cost_pictures.accuracy_over_bytes(groups).axes
    sizes = {name: x for name, (x, _) in points(axes).items()}
    assert sizes["unpruned"] == 1_110_000
    assert sizes["Random, 0.6"] == 430_000
    assert sizes["network, quantized (all, 5 bits)"] == 30_000


@pytest.mark.parametrize(
    ("accuracies", "lowest"),
    [
        ([10.0, 80.5, 81.0, 82.5], 80.5),
        ([10.0, 75.0, 78.0, 83.0], 75.0),
        ([79.0, 80.5, 81.0, 82.5], 79.0),  # near enough
        ([60.0, 70.0, 80.0, 90.0], 60.0),  # a gap as large as others
        ([10.0, 11.0, 80.5, 81.0], 10.0),  # half of them is no exception
        ([10.0, 80.0, 81.0], 10.0),  # nor is one of three
        ([10.0, 20.0, 80.5, 81.0, 81.5, 82.0, 82.0, 82.0], 80.5),
    ],
)
def test_an_axis_begins_above_what_lies_far_below_all_others(accuracies, lowest):
    assert panels.lowest_shown(accuracies[::-1]) == lowest


def test_what_lies_below_the_axis_is_marked_and_named(tmp_path):
    for number, (mode, top1) in enumerate([("filter-a", 81.0), ("filter-gm", 82.0), ("filter-r", 80.0), ("filter-l2", 10.5)]):
        write_pruned(tmp_path / str(number), top1=top1, prune_mode=mode, distill=["none"])
    groups = gather([tmp_path]).groups
    (axes,) = cost_pictures.accuracy_over_macs(groups).axes
    assert list(dots(axes)) == ["FPGM, 0.6", "PFEC, 0.6", "Random, 0.6", "L2, 0.6: below, 10.5 %"]
    assert dots(axes)["L2, 0.6: below, 10.5 %"][0] == 80.0
    write_unpruned(tmp_path / "teacher", top1=82.5)
    write_pruned(tmp_path / "other", top1=81.5, prune_mode="filter-chip", distill=["none"])
    summary = json.loads((tmp_path / "other" / "summary.json").read_text())
    summary["compact"]["compact"]["macs"] = 9e6
    (tmp_path / "other" / "summary.json").write_text(json.dumps(summary))
    (axes,) = cost_pictures.accuracy_over_macs(gather([tmp_path]).groups).axes
    assert 75 < axes.get_ylim()[0] < 80
    assert points(axes)["L2, 0.6: below, 10.5 %"] == (17_600_000, axes.get_ylim()[0])
    (axes,) = pictures.learning_curves(groups).axes
    assert "L2, 0.6: below, ends at 10.5 %" in [line.get_label() for line in axes.lines]
    assert axes.get_ylim()[0] > 10.5 - 40 + 1  # that of the others' first epochs, 40 points lower


def test_a_learning_curve_is_the_mean_with_a_band(groups):
    figure = pictures.learning_curves(groups)
    axes = next(axes for axes in figure.axes if axes.get_title(loc="left").endswith("fine-tuning"))
    line = next(line for line in axes.lines if line.get_label() == "NGGM + HAP + KD, 0.6")
    assert line.get_xydata().tolist() == [[1, 55.5], [2, 87.5], [3, 94.5], [4, 95.5]]
    ends = [path.vertices[:, 1] for band in axes.collections for path in band.get_paths()]
    assert any(np.isclose(band.max(), 95.5 + 0.5**0.5) for band in ends)


def test_kept_filters_are_those_of_the_run(groups):
    (axes,) = pictures.kept_filters(groups).axes
    (line,) = axes.lines  # all methods keep the same
    assert line.get_ydata().tolist() == [10, 10, 19, 38]
    assert [patch.get_height() for patch in axes.patches] == [16, 16, 32, 64]
    assert axes.get_xticklabels()[0].get_text() == "conv_1_3x3"


def test_parts_of_an_archive_add_up_to_its_file(groups):
    stages, parts = pictures.bytes_by_stage(groups).axes
    assert [patch.get_width() for patch in stages.patches] == [1_110_000, 430_000, 30_000]
    assert [patch.get_width() for patch in parts.patches] == [20_000, 3_500, 6_000, 500]
    last = parts.patches[-1]
    assert last.get_x() + last.get_width() == ARCHIVE["file_bytes"]


def test_sensitivity_follows_one_setting(groups):
    (axes,) = pictures.sensitivity(groups).axes
    assert axes.get_xlabel() == "--gamma"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.25", "0.5", "1"]
    (container,) = axes.containers
    assert container.lines[0].get_xydata().tolist() == [[0, 93.25], [1, 95.5], [2, 94.0]]


def test_a_default_stands_behind_the_numbers_of_a_setting(tmp_path):
    for name, betas in (("a", [1500.0]), ("b", None), ("c", [100.0])):
        write_pruned(tmp_path / name, top1=90.0, betas=betas)
    (axes,) = pictures.sensitivity(gather([tmp_path]).groups).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "1500", "default"]


def test_no_two_of_many_methods_look_alike():
    styles = panels.styles([None] * panels.MANY)
    assert len(set(styles)) == panels.MANY
    assert len({style.color for style in styles}) == len(panels.COLOURS)


def test_a_crowd_is_cut_to_the_best_and_says_so(tmp_path):
    for number in range(cost_pictures.MANY_DOTS + 3):
        write_pruned(tmp_path / f"run-{number}", top1=50.0 + number, lr=0.01 + number)
    write_unpruned(tmp_path / "teacher", top1=40.0)
    groups = gather([tmp_path]).groups
    (axes,) = cost_pictures.accuracy_over_macs(groups).axes
    assert sorted(accuracy for accuracy, *_ in dots(axes).values()) == [*range(50 + 4, 50 + cost_pictures.MANY_DOTS + 3)]
    assert axes.get_title(loc="left") == f"ResNet-20, digits; the best {cost_pictures.MANY_DOTS} of {cost_pictures.MANY_DOTS + 4}"
    curves = next(axes for axes in pictures.learning_curves(groups).axes if "fine-tuning" in axes.get_title(loc="left"))
    assert curves.get_title(loc="left").endswith(f"; the best {panels.MANY} of {cost_pictures.MANY_DOTS + 3}")


def test_runs_that_prune_other_layers_are_not_drawn_over_each_other(tmp_path):
    write_pruned(tmp_path / "usual", top1=90.0, exclude_layers=[])
    other = write_pruned(tmp_path / "other", top1=80.0, exclude_layers=["conv_1_3x3"])
    summary = json.loads((other / "summary.json").read_text())
    del summary["kept_filters"]["conv_1_3x3"]
    (other / "summary.json").write_text(json.dumps(summary))
    (axes,) = pictures.kept_filters(gather([tmp_path]).groups).axes
    assert len(axes.lines) == 2
    assert np.isnan(axes.lines[1].get_ydata()[0])
