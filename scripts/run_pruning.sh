#!/usr/bin/env bash
# Compares the methods: PFEC, SFP without and with recalibrated batch norm, FPGM and NGGM alone, AT, SP and AFD with KD on random pruning, and NGGM with HAP and KD.
# Without T_PATH the teacher of each dataset is trained first, as run_vanilla.sh does. Arguments are passed on to every run:
#   scripts/run_pruning.sh --dataset digits --n-epochs 1
# Variables: DATASETS SEEDS MODEL KEEP T_PATH DATA_DIR SAVE_DIR REPORT_DIR PYTHON; JOBS=n runs n at a time, GPUS lists
# where, DRY=1 only prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
DEFAULT_DATASETS="cifar10 cifar100 cinic10"
start_script "$@"

find_teachers
run_all
for dataset in $DATASETS; do
  for seed in $SEEDS; do
    add_pruning pfec "$dataset" "$seed" filter-a none "${PASSED[@]}"
    add_pruning sfp "$dataset" "$seed" filter-l2 none --soft-prune --prune-interval 1 "${PASSED[@]}"
    add_pruning sfp-recalibrated "$dataset" "$seed" filter-l2 none --soft-prune --prune-interval 1 --recalibrate-bn 25 \
      "${PASSED[@]}"
    add_pruning fpgm "$dataset" "$seed" filter-gm none "${PASSED[@]}"
    add_pruning nggm "$dataset" "$seed" filter-nggm none "${PASSED[@]}"
    for loss in at sp afd; do
      add_pruning "random-$loss" "$dataset" "$seed" filter-r "$loss" "${PASSED[@]}"
    done
    add_pruning nggm-hap "$dataset" "$seed" filter-nggm hap "${PASSED[@]}"
  done
done
run_all
finish
