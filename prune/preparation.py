"""From the settings of a pruning to what chooses the filters that stay, and what keeps the others gone."""

from collections.abc import Callable, Sequence
from functools import partial

from models.network_file import NetworkFile
from prune.allocation import FLOOR
from prune.choice import FilterChoice
from prune.forms import build_schedule
from prune.masks import PrunableLayer, keep_ratios, prunable_layers
from prune.measured_forms import trains_faster_small
from prune.schedule import Mend, PruningSchedule
from prune.sensitivity import read_rates
from prune.settings import PruningSettings
from utils.runs.folder import SENSITIVITY
from utils.training.session import Session


def filter_choice(session: Session, settings: PruningSettings, student: NetworkFile) -> FilterChoice:
    """What chooses the filters of the student that stay; the best channel multiple counts as 1 until times are known."""
    layers = prunable_layers(student.network, linear=settings.linear, example=session.data.example)
    return FilterChoice(
        student.network,
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
        earlier=student.kept,
    )


def _ratios_of(session: Session, settings: PruningSettings, layers: Sequence[PrunableLayer]) -> Sequence[float]:
    """The proportions that are retained; under a budget, or measured one by one, the least of each layer."""
    if settings.budget is not None or settings.sensitivity is not None:
        return [FLOOR]
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
        choose.network,
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
