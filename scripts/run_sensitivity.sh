#!/usr/bin/env bash
# How much NGGM with HAP depends on beta, gamma, hap-ts and samp-batches: each is varied while the others keep their value.
# Without T_PATH the teacher of each dataset is trained first, as run_vanilla.sh does. Arguments are passed on to every run:
#   scripts/run_sensitivity.sh --dataset digits --n-epochs 1
# Variables: DATASETS SEEDS MODEL KEEP T_PATH DATA_DIR SAVE_DIR REPORT_DIR PYTHON; JOBS=n runs n at a time, GPUS lists
# where, DRY=1 only prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
DEFAULT_DATASETS="cifar100"
start_script "$@"

# vary FLAG VALUE...: a run for each value; the flag comes later than that of the usual setting, and so replaces it
vary() {
  local flag=$1 value
  for value in "${@:2}"; do
    add_pruning "nggm-hap-${flag#--}-$value" "$dataset" "$seed" filter-nggm hap --hap-ts 3 "$flag" "$value" "${PASSED[@]}"
  done
}

find_teachers
run_all
for dataset in $DATASETS; do
  for seed in $SEEDS; do
    add_pruning nggm-hap "$dataset" "$seed" filter-nggm hap --hap-ts 3 "${PASSED[@]}" # beta 700, gamma 0.5, samp-batches 25
    vary --betas 100 300 500 900 1100
    vary --gamma 0 0.25 0.75 1
    vary --hap-ts 1 2 4 5
    vary --samp-batches 1 5 10 50 100
  done
done
run_all
finish
