#!/usr/bin/env bash
# What each half contributes: every criterion with HAP, and NGGM with every loss and with none.
# Without T_PATH the teacher of each dataset is trained first, as run_vanilla.sh does. Arguments are passed on to every run:
#   scripts/run_ablation.sh --dataset digits --n-epochs 1
# Variables: DATASETS SEEDS MODEL KEEP T_PATH DATA_DIR SAVE_DIR REPORT_DIR PYTHON; JOBS=n runs n at a time, GPUS lists
# where, DRY=1 only prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
DEFAULT_DATASETS="cifar100"
start_script "$@"

find_teachers
run_all
for dataset in $DATASETS; do
  for seed in $SEEDS; do
    for criterion in "${CRITERIA[@]}"; do
      add_pruning "${criterion#filter-}-hap" "$dataset" "$seed" "$criterion" hap "${PASSED[@]}"
    done
    add_pruning nggm "$dataset" "$seed" filter-nggm none "${PASSED[@]}"
    for loss in "${LOSSES[@]}"; do # with HAP it stands above already, and is listed once
      add_pruning "nggm-$loss" "$dataset" "$seed" filter-nggm "$loss" "${PASSED[@]}"
    done
  done
done
run_all
finish
