"""From the settings of a pruning to what chooses the filters that stay, and what keeps the others gone."""

from collections.abc import Callable, Sequence
from functools import partial

from models.graph import ChannelGraph
from models.graph.layers import PrunableLayer
from models.narrow import Selection
from models.network_file import NetworkFile
from prune.choice import FilterChoice
from prune.forms import build_schedule
from prune.masks import keep_ratios
from prune.measured_forms import trains_faster_small
from prune.schedule import Mend, PruningSchedule
from prune.sensitivity import read_rates
from prune.settings import PruningSettings
from utils.runs.folder import SENSITIVITY
from utils.training.session import Session


def filter_choice(session: Session, settings: PruningSettings, student: NetworkFile, *, graph: ChannelGraph) -> FilterChoice:
    """What chooses the filters of the student that stay; the best channel multiple counts as 1 until times are known."""
    layers = graph.prunable_layers(linear=settings.linear)
    return FilterChoice(
        graph,
        layers,
        keep_ratios(layers, _ratios_of(session, settings, layers), exclude=settings.exclude),
        criterion=settings.criterion,
        data=session.data,
        seed=session.settings.run.seed,
        samp_batches=settings.samp_batches,
        multiple=settings.multiple or 1,
        options={"gamma": settings.gamma, "gm_distance": settings.gm_distance},
        coupled=settings.coupled,
        budget=settings.budget,
        allocation=settings.allocation,
        earlier=Selection.from_json(graph, student.kept),
    )


def _ratios_of(session: Session, settings: PruningSettings, layers: Sequence[PrunableLayer]) -> Sequence[float] | None:
    """The proportions that are retained; None under a budget, or where they are measured one by one."""
    if settings.budget is not None or settings.sensitivity is not None:
        return None
    if settings.ratios_file is None:
        return settings.keep_ratios
    recorded = session.recorded(SENSITIVITY)
    return read_rates(recorded or settings.ratios_file, layers, drop=settings.sensitivity_drop)


def schedule_of(
    session: Session,
    settings: PruningSettings,
    choose: FilterChoice,
    *,
    on_choice: Callable[[PruningSchedule, int], None],
    mend: Mend | None = None,
) -> PruningSchedule:
    """What keeps the student pruned, mended by `mend` after each choice that is made from here on.

    `on_choice(schedule, step)` hears of the later steps of gradual pruning.
    """
    run, training = session.settings.run, session.settings.training
    is_masked = choose.is_whole or (settings.steps > 1 and training.ema is not None)
    return build_schedule(
        choose.graph,
        choose,
        soft_interval=settings.soft_interval,
        steps=settings.steps,
        last_epoch=training.n_epochs - 1,
        form="masked" if is_masked else settings.train_form,
        images=session.data.example,
        warn=session.run.warn,
        is_faster_small=partial(trains_faster_small, choose, steps=settings.steps, amp=run.amp, compiled=run.compile),
        on_choice=on_choice,
        mend=mend,
        state=session.state,
    )
