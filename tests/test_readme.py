"""README and docs/ against the code: every flag, every command, every file that they name, and the examples that they show."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from utils import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPT_CALL = re.compile(r"(?:^|\s)(?:initial_train|pruning|quantize_encode|export|predict|report)\.py\s")
ENTRY_SCRIPTS = ("initial_train.py", "pruning.py", "quantize_encode.py", "export.py", "predict.py", "report.py")
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks(README, "bash") for line in block.splitlines()]
COMMANDS_OF_DOCS = {line for text in DOCS.values() for block in blocks(text, "bash") for line in block.splitlines()}


def is_call(line):
    """Whether a line calls an entry script for a network that is there; `nets.py` is an example, run by other tests."""
    return SCRIPT_CALL.search(line) is not None and "nets.py" not in line


def parser_of(script):
    return importlib.import_module(script.removesuffix(".py")).get_args_parser()


def flags_of(script):
    flags = {flag for action in parser_of(script)._actions for flag in action.option_strings if flag.startswith("--")}
    return sorted(flags - {"--help", "--help-all", "--version"})


def test_every_flag_is_explained_once_and_no_other():
    _, *parts = re.split(r"^(`\w+\.py`.*:)$", DOCS["flags.md"], flags=re.MULTILINE)
    explained = {script: [] for script in ENTRY_SCRIPTS}
    for heading, table in zip(parts[::2], parts[1::2], strict=True):
        for script in re.findall(r"\w+\.py", heading):
            explained[script] += re.findall(r"^\| `(--[a-z0-9-]+)", table, re.MULTILINE)
    assert {script: sorted(flags) for script, flags in explained.items()} == {
        script: flags_of(script) for script in ENTRY_SCRIPTS
    }


def test_defaults_in_the_tables_are_those_of_the_code():
    rows = re.findall(r"^\| `(--[a-z0-9-]+)[^|]*\| `([^`<]+)` \|", DOCS["flags.md"], re.MULTILINE)
    named = {flag.removeprefix("--").replace("-", "_"): text for flag, text in rows}
    defaults = {action.dest: action.default for action in parser_of("pruning.py")._actions}
    compared = {name: text for name, text in named.items() if defaults.get(name) is not None}
    assert len(compared) > 15
    for name, text in compared.items():
        default = defaults[name]
        default = default[0] if isinstance(default, list) else default
        assert type(default)(text) == default, name


@pytest.mark.parametrize(
    "line", [line for line in sorted({*COMMANDS, *COMMANDS_OF_DOCS}) if SCRIPT_CALL.search(line) and "nets.py" not in line]
)
def test_every_command_parses(line):
    words = shlex.split(line.partition(" >")[0])
    position = next(i for i, word in enumerate(words) if word in ENTRY_SCRIPTS)
    parser = parser_of(words[position])
    if "--resume" in words:
        parser.parse_args(words[position + 1 :])
    elif hasattr(parser.parse_args(words[position + 1 :]), "default_schedule"):
        cli.parse_flags(parser, words[position + 1 :])


def test_the_two_commands_are_there():
    assert COMMANDS.count(
        "python3 initial_train.py --model resnet56 --dataset cifar10 --lr 0.01 --schedule 1 60 120 160 "
        "--lr-drops 10 0.2 0.2 0.2 --batch-size 128 --seed 8152"
    )
    assert COMMANDS.count(
        "python3 pruning.py --t-model resnet56 --s-copy-t --dataset cifar10 --prune-rates 0.6 --prune-mode filter-r "
        "--t-path saves/1625594011/model_best.pt --distill at --betas 1000 --log-name PRUNED-CIFAR10.txt --seed 8152"
    )


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{name}" for name in DOCS)])
def test_every_file_that_a_page_names_is_there(name):
    text, folder = (ROOT / name).read_text(), (ROOT / name).parent
    named = {folder / path for path in re.findall(r"\]\(((?!https?:)[^)#]+)[)#]", text)}
    named |= {ROOT / path for path in re.findall(r"\bscripts/\w+\.sh|requirements[\w-]*\.txt", text)}
    assert {str(path) for path in named if not path.exists()} == set()


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{name}" for name in DOCS)])
def test_every_section_that_a_page_names_is_there(name):
    folder = (ROOT / name).parent
    for path, section in re.findall(r"\]\(((?!https?:)[^)#]*)#([^)]+)\)", (ROOT / name).read_text()):
        target = (folder / path if path else ROOT / name).read_text()
        titles = re.findall(r"^#+ (.*)$", target, re.MULTILINE)
        assert section in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_readme_is_short_and_names_every_page():
    assert len(README.splitlines()) <= 165
    assert {name for name in DOCS if f"docs/{name}" not in README} == set()


def lines_of(name):
    return [json.loads(line) for line in (ROOT / "benchmarks" / "results" / name).read_text().splitlines()]


def test_figures_of_the_readme_are_those_that_were_measured():
    """The headline of the fine-tuned network is held by test_report."""
    text = " ".join(README.split())
    (row,) = (
        row
        for row in lines_of("pruning_without_training.jsonl")
        if (row["criterion"], row["size"], row["layout"]) == ("filter-a", "macs=0.5", "coupled")
    )
    assert f"keeps **{row['top1']['reconstructed']:.1f} %** of its {row['teacher_top1']:.1f} % top-1" in text
    assert f"squares on {row['images']} images; plain pruning leaves {row['top1']['plain']:.1f} %" in text
    rows = json.loads((ROOT / "benchmarks" / "results" / "budgets.json").read_text())["rows"]
    times = {row["task"]: row["time"] for row in rows if (row["network"], row["budget"]) == ("resnet56", "MACs, coupled, by 8")}
    assert f"runs in **{times['forward, batch 64']:.2f}** of the time in PyTorch" in text
    assert f"and **{times['onnxruntime, batch 64']:.2f}** in onnxruntime" in text
    single = f"{times['forward, batch 1']:.2f} and {times['onnxruntime, batch 1']:.2f}"
    assert f"a single image in {single}" in text


def test_variables_of_the_environment_are_those_of_the_scripts():
    tables = DOCS["running_studies.md"]
    explained = set(re.findall(r"`([A-Z_]+)`", "".join(re.findall(r"^\| (`[A-Z_`, ]+) \|", tables, re.MULTILINE))))
    code = "".join(path.read_text() for path in (ROOT / "scripts").glob("*.sh"))
    assert explained == set(re.findall(r"\b([A-Z_]+)=\$\{\1:-", code)) | {"PYTHON"}


# Runs in a copy of the repository in which both examples were put into place.
USE_EXTENSIONS = """
import torch
from distill import build_distiller
from models.outputs import Outputs
from prune.criteria import CRITERIA
from pruning import get_args_parser

args = get_args_parser().parse_args("--prune-mode filter-snip --distill hint --hint-stage 1".split())
weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).reshape(2, 2, 1, 1)
assert CRITERIA[args.prune_mode].needs_gradient
assert CRITERIA[args.prune_mode](weight, torch.ones_like(weight)).tolist() == [3.0, 4.0]

maps = (torch.ones(2, 3, 4, 4),)
outputs = Outputs(torch.zeros(2, 10), maps, maps, torch.zeros(2, 3))
loss = build_distiller("hint", student=outputs, teacher=outputs, hint_stage=args.hint_stage)
torch.nn.init.zeros_(loss.match.weight)
torch.nn.init.zeros_(loss.match.bias)
assert loss(outputs, outputs).item() == 1.0
"""


def test_the_examples_of_a_criterion_and_a_loss_work_as_they_stand(tmp_path):
    for package in ("models", "prune", "distill", "deploy", "utils"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pruning.py", tmp_path)
    criterion, loss, entry = blocks(DOCS["extending.md"], "python")
    with open(tmp_path / "prune/criteria.py", "a") as file:
        file.write("\n\n" + criterion)
    (tmp_path / "distill/hint.py").write_text(loss)
    with open(tmp_path / "distill/registry.py", "a") as file:
        file.write("\n\n" + entry)
    result = subprocess.run([sys.executable, "-c", USE_EXTENSIONS], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


USE_FILES = """
import numpy
import PIL.Image
import torch

torch.manual_seed(0)
pixels = torch.rand(2, 3, 32, 32)
PIL.Image.fromarray((255 * pixels[0].permute(1, 2, 0)).byte().numpy()).save("photo.png")
"""


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "small"])
def test_the_lines_that_use_a_small_network_work_as_they_stand(runtime, trained_run, run_script, tmp_path):
    """In a folder that holds nothing but the files that the commands before them leave."""
    if runtime != "small":
        pytest.importorskip(runtime)
    pytest.importorskip("onnxruntime")
    (block,) = (own for own in blocks(README + DOCS["deployment.md"], "python") if re.match(rf"import {runtime}\b", own))
    section = README.split("## Use the small network\n")[1].split("\n## ")[0]
    words = [line.replace("saves/pruned", str(trained_run)) for line in COMMANDS if "export.py" in line and line in section]
    wanted = re.search(r"small[\w.-]*\.onnx", block)
    line = next(line for line in words if line.endswith(wanted.group() if wanted else "small.py"))
    limits = "--limit-batches 1 --batch-size 8" + (" --calibration-images 8 --int8-tolerance 100" if "--int8" in line else "")
    _, _, *flags = shlex.split(f"{line} {limits}")
    flags[flags.index("--output") + 1] = str(tmp_path / flags[flags.index("--output") + 1])
    ended = run_script("export", *flags)
    assert ended.status == 0, ended.errors
    prepare = "" if runtime == "small" else "images = ((pixels - 0.3) / 0.3).numpy()\n"
    code = f"{USE_FILES}{prepare}{block}\nassert tuple(logits.shape) == ({2 if runtime == 'openvino' else 1}, 10)\n"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
