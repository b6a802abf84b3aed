"""One sentence on one method, for the head of a page: accuracy with its interval, and how much smaller the network is.

How much faster it is, a benchmark has to say, beside which nothing else runs. In a Markdown file it goes between
`<!-- headline: METHOD -->` and `<!-- headline:end -->`.
"""

from collections.abc import Sequence

from reporting.comparison import interval_of_seeds
from reporting.gather import Group
from reporting.naming import model_label
from reporting.tables import bytes_text, markdown_text
from utils.errors import UserError, shown

NEEDED = ("drop", "macs", "dense_macs", "dense_bytes", "compact_bytes")


def headline(groups: Sequence[Group], method: str) -> str:
    """Raises UserError unless there is one group of this name, of several seeds, that has every figure."""
    found = [group for group in groups if group.name == method]
    if len(found) != 1 or len(found[0].records) < 2:
        raise UserError(f"headline {shown(method)}: needs one method of this name and two seeds, found {len(found)}")
    (group,) = found
    figures = {name: group.statistic(name) for name in NEEDED}
    if None in figures.values():
        raise UserError(f"headline {shown(method)}: has no {next(name for name in NEEDED if figures[name] is None)}")
    low, high = interval_of_seeds(group.accuracies)
    accuracy, mean = group.statistic("last_top1").mean, {name: figure.mean for name, figure in figures.items()}
    small, whole = (bytes_text(figures[name]) for name in ("compact_bytes", "dense_bytes"))
    dataset, model = group.subject
    return (
        f"{model_label(model)} on {markdown_text(dataset)}, {markdown_text(method)}: "
        f"**{accuracy:.2f} %** top-1 [{low:.2f}, {high:.2f}] from {accuracy + mean['drop']:.2f} %, "
        f"{mean['dense_macs'] / mean['macs']:.1f} times fewer multiply-accumulates, {small} in place of {whole} "
        f"({len(group.records)} seeds, 95 % interval).\n"
    )
