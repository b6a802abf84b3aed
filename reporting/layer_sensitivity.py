"""The picture of `pruning.py --sensitivity`: how much accuracy each layer loses alone, at each proportion of its filters."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from reporting.panels import LOOK, png

ROW, COLUMN, LABELS, MARGIN = 0.19, 0.52, 2.6, 1.3  # inches
STRONG = 0.55  # of the largest loss: from there on figures are white


def draw_sensitivity(document: Mapping[str, Any]) -> bytes:
    """A PNG with a row for each layer or group and a column for each proportion: points of accuracy lost."""
    families, proportions = document["families"], document["proportions"]
    lost = np.array([[document["top1"] - top1 for top1 in family["top1"]] for family in families])
    largest = max(1.0, float(lost.max()))
    names = [_label(family) for family in families]
    size = (LABELS + COLUMN * len(proportions) + 1.2, MARGIN + ROW * len(families))
    with matplotlib.rc_context({**LOOK, "axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(lost, cmap="cividis_r", vmin=0, vmax=largest, aspect="auto")
        axes.set_xticks(range(len(proportions)), [f"{proportion:g}" for proportion in proportions])
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.tick_params(length=0)
        axes.set_xlabel("proportion of filters retained, of this layer alone")
        axes.set_title(
            f"{document['network']}, {document['dataset']}, {document['prune_mode']}: {document['top1']:.2f} % when whole"
        )
        for (row, column), value in np.ndenumerate(lost):
            colour = "white" if value > STRONG * largest else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=6, color=colour)
        figure.colorbar(image, ax=axes, label="points of top-1 lost, without training", fraction=0.05, pad=0.02)
        return png(figure)


def _label(family: Mapping[str, Any]) -> str:
    layers = family["layers"]
    more = f" +{len(layers) - 1}" if len(layers) > 1 else ""
    return f"{layers[0]}{more} ({family['filters']})"
