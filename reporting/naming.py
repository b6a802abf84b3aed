"""How a report calls a method, by its papers' names, from the flags of its run; and what its pictures are called."""

import re
from collections.abc import Mapping
from typing import Any

from distill.registry import DISTILLERS
from prune.criteria import CRITERIA
from utils.errors import printable
from utils.python_file import function_of, names_function

VALUE_LENGTH = 80  # characters that are shown of a flag's value
SOFT_CRITERIA = {"filter-a": "SFP (L1)", "filter-l2": "SFP", "filter-gm": "SFP (GM)"}
MODELS = {"alexnet": "AlexNet"}
ORIGIN_FLAGS = ("t_path", "s_path", "load_path")
PICTURE_NAMES = (  # in the order of a report; `reporting.pictures` draws them
    "accuracy_macs",
    "accuracy_time",
    "accuracy_bytes",
    "accuracy_pflops",
    "learning_curves",
    "kept_filters",
    "bytes",
    "sensitivity",
)
README_PICTURES = ("accuracy_macs", "bytes")


def method_label(settings: Mapping[str, Any], *, with_size: bool = True) -> str:
    """`NGGM + HAP + KD, 0.6` for the settings of a run as `reporting.gather` reads them; without the size for all sizes of it."""
    if settings.get("script") == "pruning.py":
        return _pruned(settings, with_size=with_size)
    if settings.get("script") == "quantize_encode.py":
        return _quantized(settings)
    if _has_origin(settings, "load_path"):
        return "unpruned, trained on"
    return "unpruned, pre-trained" if settings.get("pretrained") else "unpruned"


def model_label(model: str) -> str:
    """`resnet56` -> `ResNet-56`; networks of others as they are called, those of a file without its folder."""
    if names_function(model):
        return re.split(r"[/\\]", model)[-1]
    return MODELS.get(model, re.sub(r"^resnet(?=\d+$)", "ResNet-", model))


def flag_label(name: str, value: Any) -> str:
    """A setting as one would type it: `--prune-rates 0.6`; of the run that another flag names `--n-epochs 10 of --t-path`."""
    *origins, flag = map(dashed, name.split())
    text = f"no {flag}" if value is False else flag if value is True else f"{flag} {value_text(value)}"
    return " of ".join([text, *reversed(origins)])


def value_text(value: Any) -> str:
    """A flag's value; None stands for a default that depends on other flags."""
    if isinstance(value, list):
        return printable(" ".join(map(value_text, value)), VALUE_LENGTH) or "none"
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else printable(str(value), VALUE_LENGTH)


def origin_settings(settings: Mapping[str, Any], flag: str) -> dict[str, Any]:
    """Those settings that say how the file in `flag` was made; empty if that is not known."""
    prefix = f"{flag} "
    return {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}


def dashed(flag: str) -> str:
    """`t_path` -> `--t-path`."""
    return "--" + flag.replace("_", "-")


def _pruned(settings: Mapping[str, Any], *, with_size: bool) -> str:
    mode = settings.get("prune_mode")
    titles = SOFT_CRITERIA if settings.get("soft_prune") else {name: entry.title for name, entry in CRITERIA.items()}
    criterion = titles.get(mode, value_text(function_of(mode) if names_function(mode) else mode))
    is_whole = settings.get("budget") is None and settings.get("prune_rates") == [1.0]
    parts = [" + ".join(["unpruned" if is_whole else criterion, *_losses(settings)])]
    if with_size and not is_whole:
        parts.append(_size(settings))
    if not settings.get("s_copy_t", True) and not _has_origin(settings, "s_path"):
        parts.append("from new weights")
    if settings.get("couple_channels"):
        parts.append("coupled")
    multiple, batches = settings.get("channel_multiple") or 1, settings.get("recalibrate_bn")
    if multiple != 1:
        parts.append("best multiple" if multiple == "auto" else f"multiple of {multiple}")
    if batches:
        parts.append(f"BN recalibrated over {batches} batch{'' if batches == 1 else 'es'}")
    return ", ".join(parts)


def _has_origin(settings: Mapping[str, Any], flag: str) -> bool:
    """Whether the run was given a file in this flag."""
    return settings.get(flag) is not None or bool(origin_settings(settings, flag))


def _losses(settings: Mapping[str, Any]) -> list[str]:
    names = [name for name in settings.get("distill") or [] if name not in ("none", "kd")]
    with_kd = settings.get("distill") != ["none"] and settings.get("alpha")
    shown = [*names, *(["kd"] if with_kd else [])]
    return [value_text(_loss_label(name, standardised=bool(settings.get("kd_standardize")))) for name in shown]


def _loss_label(name: str, *, standardised: bool) -> str:
    """Others may have written the run: its loss need not be one of ours."""
    if names_function(name):
        return function_of(name)
    entry = DISTILLERS.get(name)
    title = entry.title if entry is not None and entry.title is not None else name.upper()
    return f"standardised {title}" if standardised and entry is not None and "kd_standardize" in entry.options else title


def _size(settings: Mapping[str, Any]) -> str:
    """What stays of the network: a proportion of its filters, or a budget and how it is spent."""
    budget = settings.get("budget")
    if budget is None:
        return _ratio(settings.get("prune_rates"))
    return value_text(budget) + (" global" if settings.get("allocation") == "global" else "")


def _ratio(ratios: Any) -> str:
    if not isinstance(ratios, list):
        return "?"
    if isinstance(ratios[0], str):
        return "by sensitivity"
    return f"{ratios[0]:g}" if len(ratios) == 1 else f"{min(ratios):g} to {max(ratios):g} by layer"


def _quantized(settings: Mapping[str, Any]) -> str:
    origin = origin_settings(settings, "load_path")
    mode = value_text(settings.get("quan_mode")).removesuffix("-quan")
    name = method_label(origin) if origin else "network"
    if mode == "int8":
        return f"{name}, " + " + ".join(["int8", *_losses(settings)])
    return f"{name}, quantized ({mode}, {value_text(settings.get('quan_bits'))} bits)"
