#!/usr/bin/env bash
# The benchmark that decides: criteria, losses, allocations and controls at equal MACs and one schedule, a teacher for each seed.
# It ends in a report that says which rows are not told apart; $SAVE_DIR/benchmark.jsonl.gz has all runs that have ended. On
# CIFAR-10 as a folder of images, and shorter than usual:
#   DATA_DIR=cifar10-jpeg STUDENT_EPOCHS=2 STUDENT_BATCHES=98 scripts/run_benchmark.sh --dataset folder
# The standard pairs of teacher and student on CIFAR-100, by every loss at its published settings, as a GPU would run them; the dry
# run says how many PFLOPs each takes, and all together:
#   DRY=1 PARTS=pairs scripts/run_benchmark.sh --dataset cifar100
# Variables: PARTS, of criteria losses controls allocation hard leading pairs; PAIRS, teacher:student of RepDistiller; HARD, the budget of the part hard; LATENCY, that of time;
# and as in every script DATASETS SEEDS MODEL KEEP RECIPE TEACHER_EPOCHS STUDENT_EPOCHS STUDENT_BATCHES T_PATH DATA_DIR SAVE_DIR
# REPORT_DIR PYTHON; JOBS=n runs n at a time, GPUS lists where, DRY=1 only prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
DEFAULT_DATASETS="cifar10"
SEEDS=${SEEDS:-1 2 3} MODEL=${MODEL:-resnet20} KEEP=${KEEP:-macs=0.45} RECIPE=${RECIPE:-short} STUDENT_EPOCHS=${STUDENT_EPOCHS:-2}
PARTS=${PARTS:-criteria losses controls allocation hard} HARD=${HARD:-macs=0.2} LATENCY=${LATENCY:-latency=0.7}
PAIRS=${PAIRS:-resnet56:resnet20 resnet110:resnet32 resnet32x4:resnet8x4 wrn_40_2:wrn_16_2 resnet32x4:ShuffleV2}
PAIR_LOSSES="kd fitnet at sp rkd pkt crd afd hap dkd dist reviewkd wttm nkd ctkd kd-standardized dkd-standardized"
start_script "$@"
if [[ $DRY == 1 && " $PARTS " == *" pairs "* && -z ${COUNTED-} ]]; then
  COUNTED=1 scripts/run_benchmark.sh "$@" | "$PYTHON" -m scripts.list_pflops
  exit
fi
STUDY=$SAVE_DIR/benchmark.jsonl.gz

# check_budget VARIABLE KIND EXAMPLE
check_budget() {
  [[ ${!1} =~ ^$2=0?\.[0-9]*[1-9][0-9]*$ ]] || fail "$1=${!1}: must be a budget such as $3, all methods have the same $2 here"
}
check_budget KEEP macs macs=0.45
check_budget HARD macs macs=0.2
check_budget LATENCY latency latency=0.7

# add_row CRITERION LOSS: by the same name wherever it belongs to several parts, so that it runs once.
add_row() {
  local label=$1
  if [[ $2 != none ]]; then label+=-$2; fi
  add_pruning "$label" "$dataset" "$seed" "filter-$1" "$2" "${PASSED[@]}"
}

criteria() {
  local criterion
  for criterion in r a l2 gm nggm taylor bn hrank chip; do
    add_row "$criterion" none
  done
  add_pruning sfp "$dataset" "$seed" filter-l2 none --soft-prune "${PASSED[@]}"
  add_pruning sfp-recalibrated "$dataset" "$seed" filter-l2 none --soft-prune --recalibrate-bn 25 "${PASSED[@]}"
}

losses() {
  local loss criterion
  for loss in none kd at sp afd hap dkd dist reviewkd fitnet rkd pkt crd wttm nkd ctkd; do
    add_row nggm "$loss"
  done
  add_pruning nggm-kd-standardized "$dataset" "$seed" filter-nggm kd --kd-standardize --kd-t 2 --alpha 9 "${PASSED[@]}"
  for criterion in r a gm; do
    add_row "$criterion" hap
  done
}

# controls: the small network from new weights, the teacher trained on, and HAP on the whole network, each for about as many
# floating-point operations as the fine-tuning of a pruned network with a teacher, an epoch of which takes 3 times KEEP and 1 for
# the teacher: as many epochs as that gives, and with STUDENT_BATCHES more of them, each with fewer batches.
controls() {
  local epochs share=${KEEP#macs=} length
  as_long_as() {
    length=$(awk -v e="$epochs" -v s="$share" -v b="${STUDENT_BATCHES:-0}" "BEGIN {
      exact = e * (3 * s + 1) / ($1)
      n = b ? int(exact + 0.999) : int(exact + 0.5)
      printf(b ? \"--n-epochs %d --limit-batches %d\" : \"--n-epochs %d\", n > 1 ? n : 1, b * exact / n + 0.5)
    }")
    read -ra LENGTH <<<"$length"
  }
  recipe "$dataset" student
  epochs=$(sed -E 's/.*--n-epochs ([0-9]+).*/\1/' <<<"${RECIPE_FLAGS[*]} ${SHARED[*]}")
  as_long_as '3 * s'
  add_run pruning.py scratch "$dataset" "$seed" '' --s-model "$MODEL" --budget "$KEEP" --prune-mode filter-r \
    "${RECIPE_FLAGS[@]}" "${SHARED[@]}" "${LENGTH[@]}" --lr 0.2
  as_long_as 3
  add_run initial_train.py longer "$dataset" "$seed" "$teacher" --load-path "$teacher" "${RECIPE_FLAGS[@]}" \
    "${SHARED[@]}" "${LENGTH[@]}"
  add_row nggm none
  add_row nggm hap
  recipe "$dataset" student
  distillation "$dataset" hap
  as_long_as 4
  add_run pruning.py whole-hap "$dataset" "$seed" "$teacher" --t-path "$teacher" --s-copy-t "${DISTILLATION[@]}" \
    "${RECIPE_FLAGS[@]}" "${SHARED[@]}" "${LENGTH[@]}"
}

# allocation: how the budget is spent. The first run of all measures the layers for the budget of time, alone, and the others take
# its table.
allocation() {
  local criterion
  for criterion in nggm a; do
    add_row "$criterion" hap
    add_pruning "$criterion-coupled" "$dataset" "$seed" "filter-$criterion" hap --couple-channels "${PASSED[@]}"
    add_pruning "$criterion-global" "$dataset" "$seed" "filter-$criterion" hap --couple-channels --allocation global "${PASSED[@]}"
    by_latency "$criterion"
  done
}

by_latency() {
  local KEEP=$LATENCY table=()
  if [[ -n ${TABLES[$dataset]-} ]]; then table=(--budget-table "${TABLES[$dataset]}"); else run_all; fi
  add_pruning "$1-latency" "$dataset" "$seed" "filter-$1" hap --couple-channels "${table[@]}" "${PASSED[@]}"
  if [[ -z ${TABLES[$dataset]-} ]]; then
    TABLES[$dataset]=$FOLDER/latency_table.json
    run_all
  fi
}

hard() {
  local KEEP=$HARD
  leading
}

# leading: what did best in criteria and losses (docs/results.md), and the baselines.
leading() {
  local row
  for row in r:none a:none nggm:none nggm:kd nggm:hap gm:hap nggm:at nggm:afd nggm:reviewkd; do
    add_row "${row%:*}" "${row#*:}"
  done
}

# pairs: a student alone and by every loss, from teachers that are trained alike.
pairs() {
  local pair student loss recipe slow=()
  [[ $dataset == cifar100 ]] || fail "PARTS=pairs: is for --dataset cifar100, whose settings are published, not $dataset"
  for pair in $PAIRS; do
    teacher=$SAVE_DIR/${VANILLA["${pair%:*} $seed"]}/model_last.pt student=${pair#*:}
    slow=()
    if [[ $student =~ ^(Shuffle|MobileNet) ]]; then slow=(--lr 0.01); fi # as the official code has it for these
    MODEL=repdistiller/$student add_run initial_train.py alone "$dataset" "$seed" '' --model "repdistiller/$student" \
      --recipe cifar100 "${slow[@]}" "${SHARED[@]}"
    for loss in $PAIR_LOSSES; do
      recipe=cifar100-$loss
      if [[ $loss =~ ^(dkd|dkd-standardized|reviewkd)$ ]]; then recipe+=-${pair/:/-}; fi
      MODEL=repdistiller/$student add_run pruning.py "$loss-by-${pair%:*}" "$dataset" "$seed" "$teacher" \
        --t-model "repdistiller/${pair%:*}" --t-path "$teacher" --s-model "repdistiller/$student" --recipe "$recipe" \
        "${slow[@]}" "${PASSED[@]}"
    done
  done
}

# find_pair_teachers: VANILLA holds the folder of each teacher's training, by its name and seed.
find_pair_teachers() {
  local pair seed
  for pair in $PAIRS; do
    [[ $pair =~ ^[A-Za-z0-9_]+:[A-Za-z0-9_]+$ ]] || fail "PAIRS=$PAIRS: must be teacher:student, such as resnet56:resnet20"
    for seed in $SEEDS; do
      MODEL=repdistiller/${pair%:*} add_run initial_train.py alone cifar100 "$seed" '' --model "repdistiller/${pair%:*}" \
        --recipe cifar100 "${SHARED[@]}"
      VANILLA["${pair%:*} $seed"]=$(basename "$FOLDER")
    done
  done
}

declare -A VANILLA=() TEACHERS=() TABLES=()
for part in $PARTS; do
  [[ $part =~ ^(criteria|losses|controls|allocation|hard|leading|pairs)$ ]] || fail "PARTS=$PARTS: there is no part $part"
done
if [[ " $PARTS " == *" pairs "* ]]; then find_pair_teachers; fi
if [[ $PARTS != pairs ]]; then find_teachers_by_seed; fi
run_all
for part in $PARTS; do
  for seed in $SEEDS; do
    for dataset in $DATASETS; do
      TEACHERS[$dataset]=${TEACHERS["$dataset $seed"]-}
      teacher=${TEACHERS[$dataset]}
      $part
    done
  done
  run_all
done
if [[ " $PARTS " == *" criteria "* ]]; then
  others="Random, $KEEP|L2, $KEEP|FPGM, $KEEP|NGGM, $KEEP|Taylor, $KEEP|BN scale, $KEEP|HRank, $KEEP|CHIP, $KEEP|SFP, $KEEP*"
  COMPARISONS+=("PFEC, $KEEP|$others")
fi
if [[ " $PARTS " == *" losses "* ]]; then
  COMPARISONS+=("NGGM + KD, $KEEP|NGGM + *, $KEEP|NGGM, $KEEP" "NGGM + HAP + KD, $KEEP|* + HAP + KD, $KEEP")
fi
if [[ " $PARTS " == *" allocation "* ]]; then
  for criterion in NGGM PFEC; do
    COMPARISONS+=("$criterion + HAP + KD, $KEEP|$criterion + HAP + KD, $KEEP*coupled|$criterion + HAP + KD, $LATENCY, coupled")
  done
fi
if [[ " $PARTS " == *" controls "* ]]; then
  COMPARISONS+=("NGGM + HAP + KD, $KEEP|NGGM, $KEEP|*, $KEEP, from new weights|unpruned*")
fi
if [[ " $PARTS " == *" hard "* ]]; then COMPARISONS+=("NGGM + KD, $HARD|*, $HARD"); fi
if [[ " $PARTS " == *" leading "* ]]; then COMPARISONS+=("NGGM + KD, $KEEP|*, $KEEP"); fi
finish
