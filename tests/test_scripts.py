"""The shell scripts: the commands that they list, and how they run them, with a stand-in for Python that trains nothing."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import summary as step_table
from benchmarks.common import write_results
from distill import DISTILLERS
from prune.criteria import CRITERIA
from scripts import methods
from utils import cli
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
RUN_SCRIPTS = ("run_vanilla", "run_pruning", "run_ablation", "run_sensitivity", "run_quantization_encode")
ENTRY_SCRIPTS = ("initial_train", "pruning", "quantize_encode")

# What the scripts call instead of Python: notes its arguments and leaves what a run leaves. A run whose name begins with
# $FAILING fails; one that begins with $HOLDING goes on until it is stopped, one that begins with $LASTING until $OTHERS runs have
# ended; each waits until $TOGETHER runs have started.
FAKE_PYTHON = (
    f"""#!/usr/bin/env bash
if [[ $* == "-m scripts.methods" || $* == "-m scripts.list_pflops" ]]; then cd {ROOT} && exec {sys.executable} "$@"; fi
"""
    + """\
if [[ ${2-} == scripts.check_commands ]]; then exit 0; fi
echo "$(date +%s.%N) start $*${CUDA_VISIBLE_DEVICES:+ on GPU $CUDA_VISIBLE_DEVICES}" >>"$NOTES"
entry=$1 folder=
while (($#)); do
  case $1 in
    --save-dir) folder=$2 ;;
    --run-name) folder=$folder/$2 ;;
    --resume) folder=$2 ;;
  esac
  shift
done
if [[ $entry == report.py || $entry == -* ]]; then exit 0; fi
mkdir -p "$folder" && echo '{}' >"$folder/config.json"
name=$(basename "$folder")
if [[ -n ${HOLDING-} && $name == $HOLDING* ]]; then
  trap 'echo saved >"$folder/state"; exit 143' TERM
  echo ready >"$folder/ready"
  while true; do sleep 0.05; done
fi
until (($(grep -c ' start ' "$NOTES") >= ${TOGETHER:-0})); do sleep 0.05; done
if [[ -n ${LASTING-} && $name == $LASTING* ]]; then
  until (($(grep -c ' end ' "$NOTES") >= OTHERS)); do sleep 0.05; done
fi
echo "$(date +%s.%N) end $name" >>"$NOTES"
if [[ -n ${FAILING-} && $name == $FAILING* ]]; then exit 3; fi
touch "$folder/model_best.pt"
echo '{}' >"$folder/summary.json"
"""
)


def environment(**variables):
    """This process's environment without what the scripts would follow."""
    own = {"DRY", "JOBS", "SEEDS", "DATASETS", "MODEL", "KEEP", "T_PATH", "LOAD_PATH", "BITS", "QUAN_MODE"}
    own |= {
        "MINUTES",
        "RECIPE",
        "TEACHER_EPOCHS",
        "STUDENT_EPOCHS",
        "STUDENT_BATCHES",
        "PARTS",
        "PAIRS",
        "COUNTED",
        "HARD",
        "LATENCY",
    }
    own |= {"SAVE_DIR", "DATA_DIR", "REPORT_DIR", "PYTHON", "GPUS", "CUDA_VISIBLE_DEVICES"}
    return {**{name: value for name, value in os.environ.items() if name not in own}, **variables}


def call(script, *arguments, **variables):
    command = ["bash", str(ROOT / "scripts" / f"{script}.sh"), *arguments]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=60)


def listed(script, *arguments, **variables):
    """The commands that a script would run, each as (entry script, its flags as its own parser reads them)."""
    result = call(script, *arguments, DRY="1", PYTHON="python3", **variables)
    assert result.returncode == 0, result.stderr
    *stages, (report,) = [stage.splitlines() for stage in result.stdout.split("\n\n")]
    assert report.startswith("python3 report.py ")
    return [read_command(line) for stage in stages for line in stage]


def read_command(line):
    python, entry_script, *flags = shlex.split(line)
    assert python == "python3"
    module = importlib.import_module(entry_script.removesuffix(".py"))
    args = cli.parse_flags(module.get_args_parser(), flags)
    if entry_script == "pruning.py":
        module.check_flags(args)
    return entry_script, args


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_every_script_is_valid_bash(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).stderr == b""


@pytest.mark.parametrize(
    ("script", "counts"),
    [
        ("run_vanilla", {"initial_train.py": 12}),
        ("run_pruning", {"initial_train.py": 3, "pruning.py": 9 * 3 * 4}),
        ("run_ablation", {"initial_train.py": 1, "pruning.py": (len(CRITERIA) + len(DISTILLERS)) * 4}),
        ("run_sensitivity", {"initial_train.py": 1, "pruning.py": 19 * 4}),
        ("run_quantization_encode", {"initial_train.py": 3, "pruning.py": 12, "quantize_encode.py": 48}),
        ("run_benchmark", {"initial_train.py": 2 * 3, "pruning.py": 47 * 3}),
    ],
)
def test_each_command_parses_and_names_a_run_of_its_own(script, counts):
    commands = listed(script)
    assert Counter(entry_script for entry_script, _ in commands) == counts
    assert len({args.run_name for _, args in commands}) == len(commands)
    assert {args.seed for entry, args in commands if entry != "initial_train.py"} <= {8152, 1011, 6162, 2177, 1, 2, 3}


def test_the_standard_pairs_are_trained_by_every_loss_and_say_what_they_take():
    setting = {"PARTS": "pairs", "PAIRS": "resnet56:resnet20", "SEEDS": "1", "DRY": "1", "PYTHON": sys.executable}
    result = call("run_benchmark", "--dataset", "cifar100", **setting)
    lines = [line for stage in result.stdout.split("\n\n")[:-1] for line in stage.splitlines()]
    commands = [read_command(line.partition(" # ")[0].replace(sys.executable, "python3")) for line in lines]
    trained = {(args.s_model, *args.distill) for entry, args in commands if entry == "pruning.py"}
    assert trained == {("repdistiller/resnet20", loss) for loss in DISTILLERS}
    alone = {args.model for entry, args in commands if entry == "initial_train.py"}
    assert alone == {"repdistiller/resnet56", "repdistiller/resnet20"}
    pflops = [float(re.search(r"# ([0-9.]+) PFLOPs$", line)[1]) for line in lines]
    counted, total = re.fullmatch(r"(\d+) runs, ([0-9,]+) PFLOPs in all\n", result.stderr).groups()
    assert int(counted) == len(commands) and int(total.replace(",", "")) == pytest.approx(sum(pflops), abs=3)
    # 2 x 41.9 MFLOPs a forward pass of ResNet-20, three of them for each of 50,000 images in 240 epochs
    assert pflops[[args.run_name.startswith("alone-cifar100-repdistiller-resnet20") for _, args in commands].index(True)] == 2.9


def test_networks_of_others_make_plain_names_of_runs(tmp_path):
    nets = tmp_path / "nets.py"
    nets.write_text("def small(num_classes): ...\n")
    setting = {"SEEDS": "1", "DATASETS": "digits", "MODEL": f"{nets}:small", "SAVE_DIR": str(tmp_path), "T_PATH": "teacher.pt"}
    for script in ("run_vanilla", "run_pruning"):
        assert all("/" not in args.run_name for _, args in listed(script, **setting))


def test_a_list_has_what_is_missing_in_stages_and_the_report_last(workplace):
    setting = {"DATASETS": "digits", "SEEDS": "1 2", "BITS": "3 4", **workplace}
    stages = call("run_quantization_encode", DRY="1", **setting).stdout.split("\n\n")
    entries = [[line.split()[1] for line in stage.splitlines()] for stage in stages]
    assert entries == [["initial_train.py"], ["pruning.py"] * 2, ["quantize_encode.py"] * 4, ["report.py"]]
    lines = [line for stage in stages[:-1] for line in stage.splitlines()]
    assert all(line.endswith(" --auto-resume") for line in lines)
    names = [re.search(r"--run-name (\S+)", line)[1] for line in lines]
    assert stages[-1].split() == [
        workplace["PYTHON"],
        *("report.py", "--skip-missing", "--output", workplace["REPORT_DIR"]),
        *(f"{workplace['SAVE_DIR']}/{name}" for name in names),
    ]
    for line in lines[:4]:
        subprocess.run(line, shell=True, check=True, env=environment(**workplace))
    assert call("run_quantization_encode", DRY="1", **setting).stdout == "\n".join(lines[4:]) + "\n\n" + stages[-1]


def test_the_rows_of_run_pruning():
    rows = [args for entry, args in listed("run_pruning", "--dataset", "cifar10", "--seed", "8152") if entry == "pruning.py"]
    assert [(args.prune_mode, args.soft_prune, args.distill[0], args.betas) for args in rows] == [
        ("filter-a", False, "none", None),
        ("filter-l2", True, "none", None),
        ("filter-l2", True, "none", None),
        ("filter-gm", False, "none", None),
        ("filter-nggm", False, "none", None),
        ("filter-r", False, "at", [1000]),
        ("filter-r", False, "sp", [3000]),
        ("filter-r", False, "afd", [200]),
        ("filter-nggm", False, "hap", [700]),
    ]
    assert {(args.alpha, args.kd_t, args.s_copy_t, *args.prune_rates) for args in rows} == {(0.9, 4.0, True, 0.6)}
    assert [args.recalibrate_bn for args in rows if args.soft_prune] == [None, 25]
    assert {args.samp_batches for args in rows if args.prune_mode == "filter-nggm"} == {25}
    assert {(args.n_epochs, args.batch_size, args.lr, *args.schedule, *args.lr_drops) for args in rows} == {
        (200, 128, 0.01, 60, 120, 160, 0.2, 0.2, 0.2)
    }


def test_cinic10_has_its_own_recipe():
    teacher, *rows = [args for _, args in listed("run_pruning", "--dataset=cinic10", "--seed=1")]
    assert (teacher.n_epochs, teacher.batch_size, teacher.schedule, teacher.lr_drops) == (140, 96, [1, 100, 120], [10, 0.1, 0.1])
    assert {(args.n_epochs, args.batch_size, *args.schedule, *args.lr_drops) for args in rows} == {(140, 96, 100, 120, 0.1, 0.1)}
    distilled = {args.distill[0]: (*args.betas, args.alpha, args.kd_t) for args in rows if args.distill != ["none"]}
    assert distilled == {"at": (50, 0.6, 16), "sp": (2000, 0.6, 16), "afd": (200, 0.6, 16), "hap": (700, 0.6, 16)}


def test_imagenet_has_its_own_recipe():
    """He et al., CVPR 2016: 0.1, divided by ten after 30, 60 and 90 epochs, batches of 256, weight decay 1e-4."""
    (_, teacher), *pruned = listed("run_pruning", DATASETS="imagenet", SEEDS="1", MODEL="resnet18")
    for args, lr in ((teacher, 0.1), (pruned[0][1], 0.01)):
        assert (args.n_epochs, args.batch_size, args.weight_decay, args.lr) == (100, 256, 1e-4, lr)
        assert (args.schedule, args.lr_drops) == ([30, 60, 90], [0.1, 0.1, 0.1])


def test_the_ablation_covers_every_criterion_and_every_loss():
    rows = [args for entry, args in listed("run_ablation", SEEDS="1") if entry == "pruning.py"]
    assert {args.prune_mode for args in rows if args.distill == ["hap"]} == set(CRITERIA)
    assert {args.distill[0] for args in rows if args.prune_mode == "filter-nggm"} == {"none", *DISTILLERS}


def test_the_benchmark_compares_at_one_cost_and_one_schedule():
    teacher, *commands = listed("run_benchmark", SEEDS="3", STUDENT_EPOCHS="5", STUDENT_BATCHES="90")
    assert (teacher[0], teacher[1].n_epochs, teacher[1].lr, teacher[1].lr_schedule) == ("initial_train.py", 12, 0.2, "linear")
    rows = [args for entry, args in commands if entry == "pruning.py"]
    controls = [args for args in rows if args.t_path is None or args.budget is None]
    methods = [args for args in rows if args not in controls]
    assert {args.t_path for args in methods} == {f"{teacher[1].save_dir}/{teacher[1].run_name}/model_best.pt"}
    assert {(args.n_epochs, args.limit_batches, args.lr, args.lr_schedule, args.crop_padding) for args in methods} == {
        (5, 90, 0.05, "linear", 2)
    }
    assert Counter(args.budget for args in methods) == {"macs=0.45": 34, "macs=0.2": 9, "latency=0.7": 2}
    criteria = {args.prune_mode for args in methods if args.distill == ["none"] and args.budget == "macs=0.45"}
    assert criteria < set(CRITERIA)
    losses = {args.distill[0] for args in methods if args.prune_mode == "filter-nggm" and not args.couple_channels}
    assert losses == {"none", *DISTILLERS}
    scratch, whole = controls
    longer = next(args for entry, args in commands if entry == "initial_train.py")
    assert (scratch.budget, scratch.s_path, scratch.t_path) == ("macs=0.45", None, None) and longer.load_path == whole.t_path
    cost = 5 * 90 * (3 * 0.45 + 1)  # of fine-tuning with a teacher, in forward passes of the whole network
    for args, passes in ((scratch, 3 * 0.45), (longer, 3), (whole, 4)):
        assert args.n_epochs * args.limit_batches * passes == pytest.approx(cost, rel=0.01) and args.limit_batches <= 90


def test_controls_of_whole_epochs_are_as_long_as_whole_epochs_allow():
    commands = [args for _, args in listed("run_benchmark", SEEDS="3", STUDENT_EPOCHS="5", PARTS="controls")]
    assert {args.limit_batches for args in commands} == {None}
    assert [args.n_epochs for args in commands] == [12, 9, 4, 5, 5, 3]  # 5 * 2.35 / 1.35, 5 * 2.35 / 3, 5 * 2.35 / 4


def test_the_latency_table_of_a_benchmark_is_measured_once():
    methods = [args for entry, args in listed("run_benchmark", SEEDS="3", PARTS="allocation") if entry == "pruning.py"]
    measuring, reading = (args for args in methods if args.budget == "latency=0.7")
    assert measuring.budget_table is None
    assert reading.budget_table == f"{measuring.save_dir}/{measuring.run_name}/latency_table.json"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PARTS": "criteria extras"}, "PARTS=criteria extras: there is no part extras"),
        ({"KEEP": "0.6"}, "KEEP=0.6: must be a budget such as macs=0.45"),
        ({"KEEP": "macs=0.0"}, "KEEP=macs=0.0: must be a budget such as macs=0.45"),
        ({"HARD": "latency=0.2"}, "HARD=latency=0.2: must be a budget such as macs=0.2"),
        ({"LATENCY": "0.7"}, "LATENCY=0.7: must be a budget such as latency=0.7"),
        ({"RECIPE": "quick"}, "RECIPE=quick: must be published, as the papers train, or short"),
        ({"STUDENT_EPOCHS": "0"}, "STUDENT_EPOCHS=0: must be a whole number of 1 or more"),
    ],
)
def test_a_benchmark_that_cannot_be_is_one_line(variables, message):
    result = call("run_benchmark", DRY="1", **variables)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"run_benchmark.sh: error: {message}")
    assert result.stderr.count("\n") == 1


def test_a_short_recipe_for_every_script():
    teacher, *rows = [args for _, args in listed("run_pruning", RECIPE="short", DATASETS="cifar10", SEEDS="1", KEEP="macs=0.5")]
    assert (teacher.n_epochs, teacher.lr, teacher.warmup_epochs, teacher.crop_padding) == (12, 0.2, 1, 2)
    assert {(args.n_epochs, args.lr, args.lr_schedule, args.crop_padding, args.budget) for args in rows} == {
        (4, 0.05, "linear", 2, "macs=0.5")
    }


def test_the_sensitivity_runs_differ_from_the_usual_setting_in_one_flag():
    usual, *others = [args for entry, args in listed("run_sensitivity", SEEDS="1") if entry == "pruning.py"]
    varied = ("betas", "gamma", "hap_ts", "samp_batches")
    differences = [[name for name in varied if getattr(args, name) != getattr(usual, name)] for args in others]
    assert all(len(names) == 1 for names in differences)
    assert {names[0] for names in differences} == set(varied)


def test_flags_that_reach_a_teacher_are_those_that_all_entry_scripts_have():
    parsers = [importlib.import_module(name).get_args_parser() for name in ENTRY_SCRIPTS]
    common = set.intersection(*({flag for action in parser._actions for flag in action.option_strings} for parser in parsers))
    taken = set(re.findall(r"--[a-z-]+", re.search(r"while \(\(\$#\)\); do(.*?)\*\)\n", lib(), re.DOTALL)[1])) | {
        "-h",
        "--help-all",
        "--version",
        "--config",
    }
    assert set(map(cli.flag_of, methods.shared_flags())) == common - taken


def lib():
    return (ROOT / "scripts" / "lib.sh").read_text()


@pytest.mark.parametrize("script", RUN_SCRIPTS)
def test_arguments_are_passed_on_and_replace_the_loops(script):
    commands = listed(script, "--dataset", "digits", "--seed", "7", "--n-epochs", "1", "--momentum=0.5", SAVE_DIR="elsewhere")
    assert len(commands) == len(listed(script, DATASETS="digits", SEEDS="7"))
    assert {(args.dataset, args.seed, args.n_epochs, args.momentum, args.save_dir) for _, args in commands} == {
        ("digits", 7, 1, 0.5, "elsewhere")
    }


def test_a_flag_of_pruning_does_not_reach_the_training_of_its_teacher():
    (first, teacher), *rows = listed("run_pruning", "--gamma", "0.3", "--lr", "0.2", DATASETS="digits", SEEDS="1")
    assert first == "initial_train.py" and teacher.lr == 0.2
    assert {args.lr for _, args in rows} == {0.2}
    assert {args.prune_mode for _, args in rows if args.gamma == 0.3} == {"filter-nggm"}  # no other criterion reads it
    assert {args.prune_mode for _, args in rows if args.gamma != 0.3} == {"filter-a", "filter-l2", "filter-gm", "filter-r"}


def test_options_of_losses_reach_the_runs_with_these_losses():
    words = ["--kd-t", "3", "--kd-standardize", "--dkd-beta", "4", "--dist-gamma", "1.5"]
    rows = [args for entry, args in listed("run_ablation", *words, DATASETS="cinic10", SEEDS="1") if entry == "pruning.py"]
    taken = {args.distill[0]: (args.kd_t, args.kd_standardize, args.dkd_beta, args.dist_gamma) for args in rows}
    by_kd = dict.fromkeys(("kd", "at", "sp", "afd", "hap"), (3, True, 8, 2))
    others = {"dkd": (3, True, 4, 2), "dist": (3, False, 8, 1.5), "reviewkd": (4, False, 8, 2), "none": (4, False, 8, 2)}
    expected = by_kd | others
    assert {name: taken[name] for name in expected} == expected


ASK = """
PYTHON=$0 SCRIPT=ask
source scripts/lib.sh
read_methods
applicable "$@"
printf '%s\\n' "${APPLICABLE[@]}"
"""


def test_a_new_criterion_and_a_new_loss_keep_their_flags(tmp_path):
    """The scripts know nothing of a method but what the registries say."""
    registries = tmp_path / "registries"
    lines = "criterion_flags filter-new --samp-batches", "criterion_flags filter-old --gamma", "loss_flags new --new-t"
    registries.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    registries.chmod(0o755)

    def left_of(*words):
        given = ["--samp-batches", "5", "--gamma", "0.3", "--new-t", "2", "--lr", "1"]
        command = ["bash", "-c", ASK, str(registries), *words, *given]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()

    assert left_of("filter-new", "none") == ["--samp-batches", "5", "--lr", "1"]
    assert left_of("filter-old", "new") == ["--gamma", "0.3", "--new-t", "2", "--lr", "1"]


def test_the_registries_say_what_the_flags_say():
    """Of every flag that some criterion or loss reads: listed for a method exactly if it has an effect beside it."""
    said = {tuple(line.split()[:2]): line.split()[2:] for line in methods.lines()}
    for name in CRITERIA:
        for flag, value in (("--samp-batches", "2"), ("--gamma", "0.3"), ("--gm-distance", "euclidean")):
            assert (flag in said["criterion_flags", name]) == has_effect(
                "--prune-mode", name, "--prune-rates", "0.5", flag, value
            )
    for name in DISTILLERS:
        for flag, value in (("--betas", "2"), ("--kd-t", "3"), ("--hap-ts", "2"), ("--rise-epochs", "3"), ("--alpha", "0.5")):
            assert (flag in said["loss_flags", name]) == has_effect("--distill", name, "--t-path", "a", flag, value)


def has_effect(*words):
    try:
        cli.parse_flags(importlib.import_module("pruning").get_args_parser(), ["--s-model", "resnet20", *words])
    except UserError as error:
        assert "no effect" in str(error)
        return False
    return True


def test_a_rate_that_falls_from_step_to_step_replaces_the_drops():
    words = ["--lr-schedule", "cosine", "--warmup-epochs", "5"]
    commands = listed("run_quantization_encode", *words, DATASETS="digits", SEEDS="1", BITS="5")
    assert [(args.lr_schedule, args.warmup_epochs, args.schedule) for _, args in commands] == [("cosine", 5, [])] * 3


@pytest.mark.parametrize("dataset", ["cifar10", "cinic10"])
def test_a_rate_that_falls_from_step_to_step_begins_at_the_highest(dataset):
    commands = listed("run_pruning", "--lr-schedule=linear", DATASETS=dataset, SEEDS="1")
    assert [args.lr for _, args in commands] == [0.1] + [0.01] * 9
    ((_, teacher),) = listed("run_vanilla", "--lr-schedule", "cosine", "--lr", "0.05", DATASETS=dataset, SEEDS="1")
    assert teacher.lr == 0.05


def test_steps_of_a_short_recipe_are_given():
    result = call("run_vanilla", "--lr-schedule", "steps", DRY="1", RECIPE="short")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("run_vanilla.sh: error: --lr-schedule steps: RECIPE=short has no steps")
    words = ["--lr-schedule", "steps", "--schedule", "8", "--lr-drops", "0.1"]
    ((_, teacher),) = listed("run_vanilla", *words, RECIPE="short", DATASETS="digits", SEEDS="1")
    assert (teacher.lr, teacher.schedule, teacher.lr_drops) == (0.2, [8], [0.1])


def test_all_scripts_share_one_teacher():
    names = {listed(script, "--n-epochs", "3", DATASETS="digits", SEEDS="5 6")[0][1].run_name for script in RUN_SCRIPTS}
    assert len(names) == 1


def test_given_networks_replace_their_training():
    rows = listed("run_pruning", "--t-model", "resnet20", T_PATH="t-{dataset}.pt", DATASETS="digits cifar10", SEEDS="1")
    assert {(args.t_model, args.dataset, args.t_path) for _, args in rows} == {
        ("resnet20", "digits", "t-digits.pt"),
        ("resnet20", "cifar10", "t-cifar10.pt"),
    }
    rows = listed("run_quantization_encode", DATASETS="digits", SEEDS="1 2", BITS="5", LOAD_PATH="{dataset}-{seed}.pt")
    assert [(entry, args.load_path) for entry, args in rows] == [
        ("quantize_encode.py", "digits-1.pt"),
        ("quantize_encode.py", "digits-2.pt"),
    ]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--run-name", "x"], {}, "--run-name"),
        (["--resume", "x"], {}, "--resume"),
        (["--auto-resume"], {}, "--auto-resume"),
        (["--dry-run"], {}, "DRY=1"),
        (["--dataset"], {}, "--dataset: expected a value"),
        ([], {"JOBS": "0"}, "JOBS=0"),
        ([], {"GPUS": "0,1"}, "GPUS=0,1: must be numbers of GPUs, separated by spaces"),
        ([], {"GPUS": "0 1", "DRY": "1"}, "GPUS=0 1: not with DRY=1"),
        (["--dev-idx", "1"], {"GPUS": "0 1"}, "--dev-idx: not with GPUS=0 1"),
        (["--device=cpu"], {"GPUS": "0"}, "--device: not with GPUS=0"),
        ([], {"DRY": "yes"}, "DRY=yes"),
        ([], {"T_PATH": "one.pt"}, "{dataset}"),
        (["--dataset", "digits"], {"T_PATH": "missing.pt"}, "missing.pt"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, variables, message, tmp_path):
    result = call("run_pruning", *arguments, PYTHON=sys.executable, SAVE_DIR=str(tmp_path), **variables)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "name one of the scripts: run_ablation.sh run_benchmark.sh"),
        (["--partition=gpu", "run_nothing.sh"], {}, "name one of the scripts"),
        (["run_pruning.sh"], {"GRACE": "soon"}, "GRACE=soon: must be a whole number of seconds"),
        (["run_pruning.sh"], {}, "sbatch: not found"),
    ],
)
def test_bad_arguments_of_slurm_end_in_one_line(arguments, variables, message, tmp_path):
    tools, bash = tmp_path / "tools", shutil.which("bash")  # a machine without Slurm
    tools.mkdir()
    for tool in ("dirname", "basename", "realpath"):
        (tools / tool).symlink_to(shutil.which(tool))
    env = environment(SLURM_DIR=str(tmp_path / "slurm"), PATH=str(tools), **variables)
    result = subprocess.run([bash, str(ROOT / "scripts" / "slurm.sh"), *arguments], env=env, capture_output=True, text=True)
    assert result.returncode == 2 and not (tmp_path / "slurm").exists()
    assert result.stderr.startswith("slurm.sh: error: ") and message in result.stderr and result.stderr.count("\n") == 1


@pytest.fixture
def workplace(tmp_path):
    """Variables with which a script calls the fake Python; `notes` collects what it was called with."""
    python = tmp_path / "fake_python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    (tmp_path / "notes").touch()
    paths = {"PYTHON": python, "NOTES": tmp_path / "notes", "SAVE_DIR": tmp_path / "saves", "REPORT_DIR": tmp_path / "report"}
    return {name: str(path) for name, path in paths.items()}


def calls(workplace):
    """Since the last look: the arguments of every call, in order."""
    notes = Path(workplace["NOTES"])
    lines = [line.split(" ", 2) for line in notes.read_text().splitlines()]
    notes.write_text("")
    return [arguments for _, event, arguments in lines if event == "start"]


def test_a_gpu_gets_its_work_in_the_order_of_its_worth_and_each_step_once(workplace):
    assert call("run_gpu", "--n-epochs", "1", SEEDS="1 2", FAILING="nggm-hap", **workplace).returncode == 1
    check, tests, *first = calls(workplace)
    assert check.startswith("-c import") and tests == "-m pytest -q -m gpu"
    benchmarks = [line for line in first if line.startswith("-m")]
    modes = ("float32", "amp", "compile", "compile+amp")
    steps = [re.search(r"step_cost .*--model (\S+) --forms (\S+) .*--modes (\S+)", line) for line in benchmarks]
    assert [step.groups() for step in steps if step] == [
        (network, form, mode)
        for network in ("resnet56", "resnet110", "resnet50")
        for mode in modes
        for form in ("dense", "compact", "masked", "soft")
    ]
    forms = [re.search(r"train_forms .*--modes (\S+) --budgets (\S+)", line) for line in benchmarks]
    assert [found.groups() for found in forms if found] == [(mode, budget) for mode in modes for budget in ("0.5", "0.9")]
    seeds = [re.search(r"--seed (\d)", line)[1] for line in first if line.startswith(("initial", "pruning"))]
    assert seeds == ["1"] * 5 + ["2"] * 5
    assert "--compare FPGM, 0.6|*, 0.6" in first[-1]
    assert call("run_gpu", "--n-epochs", "1", SEEDS="1 2", **workplace).returncode == 0
    check, *second = calls(workplace)
    assert [line.split()[0] for line in second if "--collect" not in line] == ["pruning.py", "pruning.py", "report.py"]


def test_a_study_has_every_run_that_has_ended(workplace):
    def collected():
        return [line.count(workplace["SAVE_DIR"]) - 2 for line in calls(workplace) if "--collect" in line]  # less the study

    setting = {"SEEDS": "1", "PARTS": "leading", **workplace}
    assert call("run_benchmark", "--n-epochs", "1", **setting).returncode == 0
    assert collected() == list(range(1, 11))
    assert call("run_benchmark", "--n-epochs", "1", **setting).returncode == 0
    assert collected() == [], "nothing new"


def test_the_steps_of_a_gpu_become_one_table(tmp_path, capsys):
    about = {"hardware": "a GPU", "torch": "2.14", "commit": "0123abc"}
    rows = {"resnet56": {"form": "plain", "ms": 2.5}, "resnet50": {"form": "plain", "ms": 20.0, "device idle": 0.25}}
    for network, row in rows.items():
        write_results("step_cost", [row], output=tmp_path / f"{network}.json", machine=about, model=network)
    paths = [str(tmp_path / f"{network}.json") for network in rows]
    step_table.main(step_table.get_args_parser().parse_args([*paths, "--output", str(tmp_path / "steps.md")]))
    text = (tmp_path / "steps.md").read_text()
    assert [re.findall(r"[^|\s]+(?: idle)?", line) for line in text.splitlines()[:4:3] + text.splitlines()[2:3]] == [
        ["network", "form", "ms", "device idle"], ["resnet50", "plain", "20", "0.25"], ["resnet56", "plain", "2.5", "-"]
    ]  # fmt: skip
    assert text.endswith("\na GPU, PyTorch 2.14, commit 0123abc\n") and capsys.readouterr().out == text
    write_results("int8", [{"ms": 1.0}], output=tmp_path / "int8.json", machine=about)
    with pytest.raises(UserError, match="results of several benchmarks: int8, step_cost"):
        step_table.main(
            step_table.get_args_parser().parse_args([*paths, str(tmp_path / "int8.json"), "--output", "unwritten.md"])
        )


def test_a_gpu_script_ends_in_time_and_every_run_saves_its_state(workplace):
    setting = {"SEEDS": "1", "HOLDING": "vanilla", "MINUTES": "1", **workplace}
    script = (ROOT / "scripts" / "run_gpu.sh").read_text().replace("sleep $((60 * MINUTES))", "sleep 2")
    (Path(workplace["SAVE_DIR"]).parent / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "lib.sh", Path(workplace["SAVE_DIR"]).parent / "scripts" / "lib.sh")
    path = Path(workplace["SAVE_DIR"]).parent / "scripts" / "run_gpu.sh"
    path.write_text(script)
    ended = subprocess.run(["bash", str(path)], env=environment(**setting), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 143
    (state,) = Path(workplace["SAVE_DIR"]).glob("vanilla*/state")
    assert state.read_text() == "saved\n"


def test_a_failed_run_stops_no_other_and_the_next_call_goes_on(workplace):
    first = call("run_pruning", DATASETS="digits", SEEDS="1", FAILING="fpgm", **workplace)
    assert first.returncode == 1
    assert re.search(r"1 failed.*\n  fpgm-digits-resnet56-seed1-\w+: exit status 3\n$", first.stderr)
    *runs, report = calls(workplace)
    assert [run.split()[0] for run in runs] == ["initial_train.py"] + ["pruning.py"] * 9
    assert report.startswith("report.py ") and report.count(workplace["SAVE_DIR"]) == 10

    second = call("run_pruning", DATASETS="digits", SEEDS="1", **workplace)
    assert second.returncode == 0, second.stderr
    resumed, report = calls(workplace)
    assert resumed in runs and "fpgm" in resumed and resumed.endswith(" --auto-resume")
    assert report.count(workplace["SAVE_DIR"]) == 10

    assert call("run_pruning", DATASETS="digits", SEEDS="1", **workplace).returncode == 0
    assert [arguments.split()[0] for arguments in calls(workplace)] == ["report.py"]


def test_other_flags_are_other_runs(workplace):
    for epochs in ("1", "2"):
        assert call("run_vanilla", "--n-epochs", epochs, DATASETS="digits", SEEDS="1 2", **workplace).returncode == 0
    assert Counter(arguments.split()[0] for arguments in calls(workplace)) == {"initial_train.py": 4, "report.py": 2}


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--n-epcohs", "3"], {}, "pruning.py: unrecognized arguments: --n-epcohs 3"),
        (["--kd-t", "none"], {}, "--kd-t: 'none' is not a number"),
        (["DRY=1"], {}, "DRY=1: a variable, it must stand before the name of the script: DRY=1 scripts/run_pruning.sh"),
        ([], {"DATASETS": "*"}, "DATASETS=*: '*' is none of digits cifar10"),
        ([], {"DATASETS": " "}, "must name one or more each"),
        ([], {"SEEDS": "1 x"}, "SEEDS=1 x: 'x' is no whole number"),
        ([], {"JOBS": "99999999999999999999"}, "JOBS=99999999999999999999: must be a whole number from 1 to 999"),
    ],
)
def test_nothing_begins_before_all_flags_are_known_to_be_right(arguments, variables, message, tmp_path):
    variables = {"DATASETS": "digits", "SEEDS": "1", "SAVE_DIR": str(tmp_path), **variables}
    result = call("run_pruning", *arguments, PYTHON=sys.executable, **variables)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_value_with_a_line_break_is_one_value(tmp_path):
    result = call("run_vanilla", "--log-name", "a\nb", DATASETS="digits", SEEDS="1", DRY="1", PYTHON="python3")
    command = result.stdout.split("\n\n")[0]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True).stdout.split("\0")
    assert words[words.index("--log-name") + 1] == "a\nb"


@pytest.mark.parametrize("name", ["a|b", "a&b", "a\\b"])
def test_lines_of_runs_begin_with_their_names_whatever_signs_these_have(name, workplace, tmp_path):
    prints = FAKE_PYTHON.replace("entry=$1", "echo a line; entry=$1")
    (tmp_path / "fake_python").write_text(prints)
    result = call("run_vanilla", JOBS="2", **{**workplace, "DATASETS": "digits", "SEEDS": "1", "MODEL": name})
    assert f"vanilla-digits-{name}-seed1-" in result.stdout and ": a line" in result.stdout


def test_without_its_teacher_nothing_is_pruned(workplace):
    result = call("run_pruning", DATASETS="digits", SEEDS="1", FAILING="vanilla", **workplace)
    assert result.returncode == 1
    assert result.stderr.count("not run, ") == result.stderr.count(" is not complete") == 9
    assert [arguments.split()[0] for arguments in calls(workplace)] == ["initial_train.py", "report.py"]


def test_jobs_run_at_a_time(workplace):
    result = call(
        "run_vanilla",
        DATASETS="digits",
        SEEDS="1 2 3 4 5 6",
        JOBS="3",
        TOGETHER="3",
        FAILING="vanilla-digits-resnet56-seed2",
        **workplace,
    )
    assert result.returncode == 1 and "seed2" in result.stderr and "1 failed" in result.stderr
    running, most = 0, 0
    for line in sorted(Path(workplace["NOTES"]).read_text().splitlines()):
        if "report.py" not in line:
            running += 1 if " start " in line else -1
            most = max(most, running)
    assert most == 3 and running == 0


def test_runs_are_spread_over_gpus(workplace):
    variables = {"DATASETS": "digits", "SEEDS": "1 2 3 4", "GPUS": "3 5", **workplace}
    assert call("run_vanilla", JOBS="4", TOGETHER="4", **variables).returncode == 0
    *runs, report = calls(workplace)
    assert Counter(run.rpartition(" --device cuda on GPU ")[2] for run in runs) == {"3": 2, "5": 2}
    assert "on GPU" not in report


def test_as_many_runs_as_gpus_at_a_time_and_the_next_gets_the_one_that_is_free(workplace):
    variables = {"DATASETS": "digits", "SEEDS": "1 2 3 4 5", "GPUS": "3 5", **workplace}
    assert call("run_vanilla", LASTING="vanilla-digits-resnet56-seed1", OTHERS="4", **variables).returncode == 0
    *runs, _ = calls(workplace)
    gpus = {re.search(r"-seed(\d)-", run)[1]: run.rpartition(" on GPU ")[2] for run in runs}  # they may start in any order
    assert gpus == {"1": "3", "2": "5", "3": "5", "4": "5", "5": "5"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_every_run_save_its_state(workplace, number, status):
    command = ["bash", str(ROOT / "scripts" / "run_vanilla.sh")]
    variables = environment(DATASETS="digits", SEEDS="1 2 3", JOBS="2", HOLDING="vanilla", **workplace)
    process = subprocess.Popen(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # these tests may run where it is ignored
    )
    saves = Path(workplace["SAVE_DIR"])
    deadline = time.monotonic() + 20
    while len(list(saves.glob("*/ready"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status, errors
    assert len(list(saves.glob("*/state"))) == 2 and "the same command goes on" in errors
    assert len(calls(workplace)) == 2


# Stands for the system's python3 and, as a link, for that of the environment: notes calls of venv and pip.
FAKE_SYSTEM_PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-m venv") echo venv >>"$NOTES"; mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch .venv/bin/pip-works ;;
  "-m pip")
    [[ -e $(dirname "$0")/pip-works ]] || exit 1
    if [[ $3 == install ]]; then echo "install ${*: -1}" >>"$NOTES"; exit "${PIP_STATUS:-0}"; fi ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A fresh machine: an empty checkout and a python3; gives a function that sets up and returns what was done for it."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(FAKE_SYSTEM_PYTHON)
    python.chmod(0o755)
    (tmp_path / "requirements.txt").write_text("numpy\n")
    notes = tmp_path / "notes"

    def set_up(**variables):
        notes.write_text("")
        real = subprocess.run(["which", "python3"], capture_output=True, text=True).stdout.strip()
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        body = f'set -euo pipefail; source {ROOT}/scripts/environment.sh; ensure_environment requirements.txt; echo "$PYTHON"'
        known = environment(PATH=path, NOTES=str(notes), REAL_PYTHON=real, **variables)
        result = subprocess.run(["bash", "-c", body], cwd=tmp_path, env=known, capture_output=True, text=True)
        return result.returncode, notes.read_text().splitlines(), result.stdout.strip()

    return set_up


def test_the_environment_is_made_once_and_again_when_it_must_be(machine, tmp_path):
    own = str(tmp_path / ".venv/bin/python")
    assert machine() == (0, ["venv", "install requirements.txt"], own)
    assert machine() == (0, [], own)
    (tmp_path / "requirements.txt").write_text("numpy\ntorch\n")
    assert machine() == (0, ["install requirements.txt"], own)
    (tmp_path / ".venv/bin/pip-works").unlink()
    (tmp_path / ".venv/bin/python").unlink()
    assert machine() == (0, ["venv", "install requirements.txt"], own)
    assert machine(PYTHON="mine") == (0, [], "mine")


def test_an_installation_that_failed_is_tried_again(machine):
    assert machine(PIP_STATUS="1")[:2] == (1, ["venv", "install requirements.txt"])
    assert machine()[:2] == (0, ["install requirements.txt"])


def test_the_commands_of_the_demo_follow_one_another(workplace):
    assert call("demo", **workplace).returncode == 0
    *runs, table = calls(workplace)
    (_, trained), (_, pruned), (_, quantized) = [read_command(f"python3 {arguments}") for arguments in runs]
    saves = Path(workplace["SAVE_DIR"])
    assert Path(pruned.t_path) == saves / trained.run_name / "model_best.pt"
    assert Path(quantized.load_path) == saves / pruned.run_name / "model_best.pt"
    folders = [str(saves / args.run_name) for args in (trained, pruned, quantized)]
    assert table == " ".join(["scripts/demo_table.py", *folders])


def test_the_table_of_the_demo(tmp_path):
    small = {"parameters": 100_000, "macs": 17_000_000}
    summaries = {
        "t": {"best": {"top1": 99.5}, "parameters": 270_000},
        "p": {"best": {"top1": 98.25}, "compact": {"dense": {"macs": 40_000_000}, "compact": small}},
        "q": {"best": {"top1": 0}, "accuracy": {"decoded": {"top1": 98.0}}},
    }
    for name, summary in summaries.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    for file, size in (("t/model_best.pt", 1200), ("p/model_compact.pt", 500), ("q/model.huff", 100)):
        (tmp_path / file).write_bytes(bytes(size))
    command = [sys.executable, ROOT / "scripts/demo_table.py", *(tmp_path / name for name in summaries)]
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    assert [row.split()[:-1] for row in rows] == [
        ["trained", "99.50", "270,000", "40,000,000", "1,200", "1.0x"],
        ["pruned", "98.25", "100,000", "17,000,000", "500", "2.4x"],
        ["quantized", "98.00", "100,000", "17,000,000", "100", "12.0x"],
    ]
