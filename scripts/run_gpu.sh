#!/usr/bin/env bash
# What to do with a CUDA machine, in the order of its worth: the tests that need one, what steps cost in every form and mode, and
# ResNet-56 on CIFAR-10 as the papers train it, with one seed, then with more; last the steps of larger networks. A step that is
# done is skipped, and a training goes on where it was stopped, so that it can be called until it ends:
#   MINUTES=9 scripts/run_gpu.sh --data-dir data
# Whatever has ended is in one study, $SAVE_DIR/gpu.jsonl.gz, and the costs of steps in one table, $SAVE_DIR/gpu_steps.md. Arguments
# are passed on to every training.
# Variables: MINUTES, after which it stops and saves; SEEDS DATASETS MODEL KEEP DATA_DIR SAVE_DIR REPORT_DIR PYTHON RECIPE
# TEACHER_EPOCHS STUDENT_EPOCHS; DRY=1 only prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
DEFAULT_DATASETS="cifar10"
SEEDS=${SEEDS:-1 2 3} MINUTES=${MINUTES:-}
start_script "$@" --checkpoint-minutes 2
[[ $MINUTES =~ ^([1-9][0-9]*)?$ ]] || fail "MINUTES=$MINUTES: must be a whole number of 1 or more"
STUDY=$SAVE_DIR/gpu.jsonl.gz
if [[ $DRY == 0 ]]; then
  "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || fail "no CUDA device was found here"
fi
if [[ -n $MINUTES && $DRY == 0 ]]; then
  (exec >/dev/null 2>&1 && sleep $((60 * MINUTES)) && kill -TERM $$) & # without the script's output, which it would hold open
  WATCH=$!
  trap 'kill $WATCH 2>/dev/null || true' EXIT
fi

# once NAME COMMAND...: runs the command, unless it has ended well before.
once() {
  local done_file=$SAVE_DIR/gpu-steps/$1
  shift
  if [[ -f $done_file ]]; then return; fi
  if [[ $DRY == 1 ]]; then
    print_stage "$(printf '%q ' "$@")"
    return
  fi
  mkdir -p "${done_file%/*}"
  echo "$*"
  if "$@" & wait $!; then touch "$done_file"; else FAILED+=("$*"); fi
}

MODES=(float32 amp compile compile+amp)

# step_costs NETWORK: a step for each form, so that none takes long, and after each the table of all
step_costs() {
  local mode form results=$SAVE_DIR/gpu-steps
  for mode in "${MODES[@]}"; do
    for form in dense compact masked soft; do
      once "step_cost-$1-$mode-$form" "$PYTHON" -m benchmarks.step_cost --device cuda --model "$1" --forms "$form" \
        --distill none hap --modes "$mode" --output "$results/step_cost-$1-$mode-$form.json"
      if compgen -G "$results/step_cost-*.json" >/dev/null; then
        "$PYTHON" -m benchmarks.summary "$results"/step_cost-*.json --output "$SAVE_DIR/gpu_steps.md" >/dev/null
      fi
    done
  done
}

train_forms() {
  local mode budget
  for mode in "${MODES[@]}"; do
    for budget in 0.5 0.9; do
      once "train_forms-$mode-$budget" "$PYTHON" -m benchmarks.train_forms --device cuda --modes "$mode" --budgets "$budget" \
        --output "$SAVE_DIR/gpu-steps/train_forms-$mode-$budget.json" --table "$SAVE_DIR/gpu-steps/measured_forms.json"
    done
  done
}

# study SEED...: the teacher of each seed, then its prunings
study() {
  local dataset seed
  local SEEDS=$*
  find_teachers_by_seed
  run_all
  for dataset in $DATASETS; do
    for seed in $SEEDS; do
      TEACHERS[$dataset]=${TEACHERS["$dataset $seed"]}
      add_pruning gm "$dataset" "$seed" filter-gm none "${PASSED[@]}"
      add_pruning nggm "$dataset" "$seed" filter-nggm none "${PASSED[@]}"
      add_pruning nggm-hap "$dataset" "$seed" filter-nggm hap "${PASSED[@]}"
      add_pruning r-hap "$dataset" "$seed" filter-r hap "${PASSED[@]}"
    done
  done
  run_all
}

once tests "$PYTHON" -m pytest -q -m gpu
step_costs resnet56
train_forms
read -ra ALL_SEEDS <<<"$SEEDS"
study "${ALL_SEEDS[0]}"
if ((${#ALL_SEEDS[@]} > 1)); then study "${ALL_SEEDS[@]:1}"; fi
for network in resnet110 resnet50; do step_costs "$network"; done
COMPARISONS=("FPGM, $KEEP|*, $KEEP")
finish
