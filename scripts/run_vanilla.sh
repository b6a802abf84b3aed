#!/usr/bin/env bash
# Trains the unpruned network on every dataset with every seed. Arguments are passed on to every run:
#   scripts/run_vanilla.sh --dataset digits --n-epochs 1
# Variables: DATASETS SEEDS MODEL DATA_DIR SAVE_DIR REPORT_DIR PYTHON; JOBS=n runs n at a time, GPUS lists where,
# DRY=1 only prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
DEFAULT_DATASETS="cifar10 cifar100 cinic10"
start_script "$@"

for dataset in $DATASETS; do
  for seed in $SEEDS; do
    add_vanilla "$dataset" "$seed" "${PASSED[@]}"
  done
done
run_all
finish
