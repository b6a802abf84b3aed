#!/usr/bin/env bash
# Quantizes pruned networks to every number of bits, fine-tunes their codebooks, encodes them, and proves the way back.
# LOAD_PATH names a pruned network, with {dataset} and {seed} in it where it differs; without it NGGM with HAP is pruned first,
# as run_pruning.sh does. Arguments are passed on to every run:
#   scripts/run_quantization_encode.sh --dataset digits --n-epochs 1
# Variables: BITS QUAN_MODE DATASETS SEEDS MODEL KEEP LOAD_PATH T_PATH DATA_DIR SAVE_DIR REPORT_DIR PYTHON; JOBS=n runs n at a
# time, GPUS lists where, DRY=1 only prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
DEFAULT_DATASETS="cifar10 cifar100 cinic10"
start_script "$@"
BITS=${BITS:-3 4 5 6} QUAN_MODE=${QUAN_MODE:-all-quan}

# find_pruned: PRUNED holds the pruned network's file of each dataset and seed
find_pruned() {
  local dataset seed
  declare -gA PRUNED=()
  if [[ -z $LOAD_PATH ]]; then
    find_teachers
    run_all
  fi
  for dataset in $DATASETS; do
    for seed in $SEEDS; do
      if [[ -z $LOAD_PATH ]]; then
        add_pruning nggm-hap "$dataset" "$seed" filter-nggm hap "${SHARED[@]}"
        PRUNED[$dataset-$seed]=$FOLDER/model_best.pt
      else
        given_file LOAD_PATH "$LOAD_PATH" "$dataset" "$seed"
        PRUNED[$dataset-$seed]=$FILE
      fi
    done
  done
}

find_pruned
run_all
for dataset in $DATASETS; do
  for seed in $SEEDS; do
    pruned=${PRUNED[$dataset-$seed]}
    for bits in $BITS; do
      add_run quantize_encode.py "$QUAN_MODE-$bits-bits" "$dataset" "$seed" "$pruned" --model "$MODEL" --load-path "$pruned" \
        --quan-mode "$QUAN_MODE" --quan-bits "$bits" --n-epochs 20 --lr 0.001 "${PASSED[@]}"
    done
  done
done
run_all
finish
