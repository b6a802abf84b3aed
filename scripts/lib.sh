# shellcheck shell=bash
# What the run_*.sh scripts share. A script lists runs with add_run, trains those listed with run_all, and ends with finish; one
# that sets STUDY=FILE.jsonl.gz has in it, at any time, all runs that have ended.
# docs/running_studies.md explains the environment variables that start_script reads.

# start_script ARGUMENT...: reads the environment, and the arguments to pass on into PASSED and SHARED
start_script() {
  SCRIPT=$(basename "$0") ARGUMENTS=("$@")
  set -f # a * in a variable is no list of files
  set_defaults
  take_arguments "$@"
  [[ $JOBS =~ ^[1-9][0-9]{0,2}$ ]] || fail "JOBS=$JOBS: must be a whole number from 1 to 999"
  check_gpus
  check_recipe
  local name
  for name in $SEEDS; do
    [[ $name =~ ^[0-9]{1,18}$ ]] || fail "SEEDS=$SEEDS: ${name@Q} is no whole number"
  done
  [[ -n ${DATASETS// /} && -n ${SEEDS// /} ]] || fail "DATASETS=$DATASETS SEEDS=$SEEDS: must name one or more each"
  for name in TEACHER_EPOCHS STUDENT_EPOCHS STUDENT_BATCHES; do
    [[ ${!name} =~ ^([1-9][0-9]*)?$ ]] || fail "$name=${!name}: must be a whole number of 1 or more"
  done
  [[ $DRY =~ ^[01]$ ]] || fail "DRY=$DRY: must be 1, to print the commands only, or 0"
  read_methods
  for name in $DATASETS; do
    [[ " $KNOWN_DATASETS " == *" $name "* ]] || fail "DATASETS=$DATASETS: ${name@Q} is none of $KNOWN_DATASETS"
  done
  mapfile -d '' -t SHARED < <(shared_arguments)
  FOLDERS=() COMMANDS=() NEEDED=() FAILED=() COMPARISONS=() SLOTS=() LISTED=0 PRINTED=0 STUDY="" UNCOLLECTED=0 CHECKED=$DRY
  trap 'stop 130' INT
  trap 'stop 143' TERM
  trap 'stop 129' HUP
}

# check_commands: reads the flags of all commands before the first one runs, as a mistyped one would be found after a teacher's
# training otherwise.
check_commands() {
  local commands problem
  commands=$(GPUS='' DRY=1 bash "scripts/$SCRIPT" "${ARGUMENTS[@]}") || exit $?
  problem=$("$PYTHON" -m scripts.check_commands 2>&1 <<<"$commands") || fail "$problem"
  CHECKED=1
}

set_defaults() {
  SEEDS=${SEEDS:-8152 1011 6162 2177} DATASETS=${DATASETS:-$DEFAULT_DATASETS} MODEL=${MODEL:-resnet56} KEEP=${KEEP:-0.6}
  DATA_DIR=${DATA_DIR:-./data} SAVE_DIR=${SAVE_DIR:-./saves} REPORT_DIR=${REPORT_DIR:-./report/${SCRIPT%.sh}}
  T_PATH=${T_PATH:-} LOAD_PATH=${LOAD_PATH:-} DRY=${DRY:-0} GPUS=${GPUS:-}
  RECIPE=${RECIPE:-published} TEACHER_EPOCHS=${TEACHER_EPOCHS:-} STUDENT_EPOCHS=${STUDENT_EPOCHS:-}
  STUDENT_BATCHES=${STUDENT_BATCHES:-}
  read -ra GPU_NUMBERS <<<"$GPUS"
  JOBS=${JOBS:-$((${#GPU_NUMBERS[@]} ? ${#GPU_NUMBERS[@]} : 1))}
  if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
  fi
}

# read_methods: what the registries say of each criterion and each loss (scripts/methods.py).
read_methods() {
  local lines kind name values
  CRITERIA=() LOSSES=()
  declare -gA CRITERION_FLAGS=() CRITERION_INPUTS=() LOSS_FLAGS=() LOSS_BETA=() LOSS_BESIDE_KD=()
  lines=$("$PYTHON" -m scripts.methods) || fail "PYTHON=$PYTHON: cannot read the methods of this repository"
  while read -r kind name values; do
    case $kind in
      criterion_flags) CRITERIA+=("$name") CRITERION_FLAGS[$name]=" $values " ;;
      criterion_inputs) CRITERION_INPUTS[$name]=" $values " ;;
      loss_flags) LOSSES+=("$name") LOSS_FLAGS[$name]=" $values " ;;
      loss_beta) LOSS_BETA[$name]=$values ;;
      loss_beside_kd) LOSS_BESIDE_KD[$name]=1 ;;
      shared_flags) SHARED_FLAGS=" $name $values " ;;
      datasets) KNOWN_DATASETS="$name $values" ;;
    esac
  done <<<"$lines"
}

check_recipe() {
  [[ $RECIPE =~ ^(published|short)$ ]] || fail "RECIPE=$RECIPE: must be published, as the papers train, or short"
  if [[ $RECIPE == short && " ${PASSED[*]} " =~ \ --lr-schedule\ steps\  && ! " ${PASSED[*]} " =~ \ --schedule\  ]]; then
    fail "--lr-schedule steps: RECIPE=short has no steps for its rate of a few epochs, give --schedule and --lr-drops too"
  fi
}

check_gpus() {
  [[ $GPUS =~ ^[0-9\ ]*$ ]] || fail "GPUS=$GPUS: must be numbers of GPUs, separated by spaces"
  if [[ -n $GPUS && $DRY == 1 ]]; then fail "GPUS=$GPUS: not with DRY=1, which GPU is free is known only while runs go on"; fi
  if [[ -n $GPUS && " ${PASSED[*]} " =~ \ --(device|dev-idx)\  ]]; then
    fail "--${BASH_REMATCH[1]}: not with GPUS=$GPUS, which says where the runs go"
  fi
}

fail() {
  echo "$SCRIPT: error: $*" >&2
  exit 2
}

# A flag that the script loops over, or names its runs by, replaces the variable; every other one is passed on to the runs.
take_arguments() {
  PASSED=()
  while (($#)); do
    if [[ $1 =~ ^[A-Z_]+=  && ${PASSED[*]: -1} != --* ]]; then
      fail "$1: a variable, it must stand before the name of the script: $1 scripts/$SCRIPT"
    fi
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
      -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
      --run-name | --resume | --auto-resume | --dry-run | --evaluate)
        fail "$1: not for a script, which names and resumes its runs itself; DRY=1 prints their commands"
        ;;
      --dataset) DATASETS=${2-} ;;
      --seed) SEEDS=${2-} ;;
      --model | --t-model) MODEL=${2-} ;;
      --t-path) T_PATH=${2-} ;;
      --load-path) LOAD_PATH=${2-} ;;
      --save-dir) SAVE_DIR=${2-} ;;
      *)
        PASSED+=("$1")
        shift
        continue
        ;;
    esac
    [[ -n ${2-} ]] || fail "$1: expected a value"
    shift 2
  done
}

# The passed arguments that every entry script understands, with their values, a zero byte behind each.
shared_arguments() {
  local argument shared=0
  for argument in "${PASSED[@]}"; do
    if [[ $argument == --* ]]; then
      if [[ $SHARED_FLAGS == *" $argument "* ]]; then shared=1; else shared=0; fi
    fi
    if ((shared)); then printf '%s\0' "$argument"; fi
  done
}

# recipe DATASET ROLE: RECIPE_FLAGS become the flags of a whole training, of a teacher or a student.
recipe() {
  if [[ $RECIPE == short ]]; then short_recipe "$2"; else published_recipe "$@"; fi
  if [[ $2 == student && -n $STUDENT_BATCHES ]]; then RECIPE_FLAGS+=(--limit-batches "$STUDENT_BATCHES"); fi
}

# A teacher's begins with an epoch of warm-up. Where an argument says that the learning rate falls from step to step, it does so
# from the highest of the rates, without drops. ImageNet's is that of He et al. (CVPR 2016), its networks begin at the highest
# rate, and pruned ones at a tenth of it (He et al., CVPR 2019, section 4.1).
published_recipe() {
  local dataset=$1 role=$2 epochs=200 batch_size=128 schedule=(60 120 160) lr_drops=(0.2 0.2 0.2) highest=0.1 more=()
  if [[ $dataset == cinic10 ]]; then epochs=140 batch_size=96 schedule=(100 120) lr_drops=(0.1 0.1); fi
  local lr=0.01
  if [[ $dataset == imagenet ]]; then
    epochs=100 batch_size=256 schedule=(30 60 90) lr_drops=(0.1 0.1 0.1) more=(--weight-decay 1e-4)
    if [[ $role == teacher ]]; then lr=$highest; fi
  elif [[ $role == teacher ]]; then
    schedule=(1 "${schedule[@]}") lr_drops=(10 "${lr_drops[@]}")
  fi
  if [[ $role == teacher ]]; then epochs=${TEACHER_EPOCHS:-$epochs}; else epochs=${STUDENT_EPOCHS:-$epochs}; fi
  RECIPE_FLAGS=(--n-epochs "$epochs" --batch-size "$batch_size" "${more[@]}")
  if [[ ! " ${PASSED[*]} " =~ \ --lr-schedule\ (linear|cosine)\  ]]; then
    RECIPE_FLAGS+=(--lr "$lr" --schedule "${schedule[@]}" --lr-drops "${lr_drops[@]}")
  elif [[ $role == teacher ]]; then
    RECIPE_FLAGS+=(--lr "$highest")
  else
    RECIPE_FLAGS+=(--lr 0.01)
  fi
}

# For images of 32x32 where time is short: the rate falls from step to step, and crops are moved less.
short_recipe() {
  RECIPE_FLAGS=(--batch-size 128 --lr-schedule linear --crop-padding 2)
  if [[ $1 == teacher ]]; then
    RECIPE_FLAGS+=(--n-epochs "${TEACHER_EPOCHS:-12}" --lr 0.2 --warmup-epochs 1)
  else
    RECIPE_FLAGS+=(--n-epochs "${STUDENT_EPOCHS:-4}" --lr 0.05)
  fi
}

# distillation DATASET LOSS: DISTILLATION becomes the flags of this loss, at the weights that its dataset has.
distillation() {
  local dataset=$1 loss=$2
  DISTILLATION=(--distill "$loss")
  case $dataset-$loss in
    cinic10-at) DISTILLATION+=(--betas 50) ;;
    cinic10-sp) DISTILLATION+=(--betas 2000) ;;
    *) if [[ -n ${LOSS_BETA[$loss]-} ]]; then DISTILLATION+=(--betas "${LOSS_BETA[$loss]}"); fi ;;
  esac
  if [[ $dataset == cinic10 && -n ${LOSS_BESIDE_KD[$loss]-} ]]; then DISTILLATION+=(--alpha 0.6 --kd-t 16); fi
}

# add_run ENTRY_SCRIPT LABEL DATASET SEED NEEDED FLAG...: lists a run that reads the file NEEDED ('' for none); FOLDER becomes
# its folder. The name ends in a checksum of the flags: another setting is another run, the same one is listed once. Its command
# begins the run, goes on with it, or does nothing where it is complete, so that it can be given any number of times.
add_run() {
  local entry_script=$1 label=$2 dataset=$3 seed=$4 needed=$5 data_dir=$DATA_DIR name command checksum
  shift 5
  checksum=$(printf '%s\n' "$@" | cksum)
  printf -v name '%s-%s-%s-seed%s-%08x' "$label" "$dataset" "${MODEL//[\/:]/-}" "$seed" "${checksum%% *}"
  FOLDER=$SAVE_DIR/$name
  if [[ " ${FOLDERS[*]} " == *" $FOLDER "* ]]; then return; fi
  if [[ $dataset == cinic10 || $dataset == imagenet ]]; then data_dir=$DATA_DIR/$dataset; fi # folders of images
  printf -v command '%q ' "$PYTHON" "$entry_script" --dataset "$dataset" --data-dir "$data_dir" "$@" --seed "$seed" \
    --save-dir "$SAVE_DIR" --run-name "$name" --auto-resume
  FOLDERS+=("$FOLDER") COMMANDS+=("${command% }") NEEDED+=("${needed%/*}")
}

# add_vanilla DATASET SEED FLAG...: lists the training of an unpruned network.
add_vanilla() {
  local dataset=$1 seed=$2
  shift 2
  recipe "$dataset" teacher
  add_run initial_train.py vanilla "$dataset" "$seed" '' --model "$MODEL" "${RECIPE_FLAGS[@]}" "$@"
}

# find_teacher DATASET SEED [SEED]: FILE becomes the teacher's file: T_PATH, with the last seed in it, or that of a training.
find_teacher() {
  if [[ -n $T_PATH ]]; then
    given_file T_PATH "$T_PATH" "$1" "${3-}"
  else
    add_vanilla "$1" "$2" "${SHARED[@]}"
    FILE=$FOLDER/model_best.pt
  fi
}

# find_teachers: TEACHERS holds the teacher's file of each dataset: T_PATH, or that of a training with the first seed.
find_teachers() {
  local dataset
  declare -gA TEACHERS=()
  for dataset in $DATASETS; do
    find_teacher "$dataset" "${SEEDS%% *}"
    TEACHERS[$dataset]=$FILE
  done
}

# find_teachers_by_seed: likewise, a teacher for each seed; TEACHERS holds its file under "dataset seed".
find_teachers_by_seed() {
  local dataset seed
  declare -gA TEACHERS=()
  for dataset in $DATASETS; do
    for seed in $SEEDS; do
      find_teacher "$dataset" "$seed" "$seed"
      TEACHERS["$dataset $seed"]=$FILE
    done
  done
}

# given_file VARIABLE VALUE DATASET [SEED]: FILE becomes VALUE, with {dataset} and {seed} in it replaced.
given_file() {
  local variable=$1 value=$2 dataset=$3 seed=${4-}
  if [[ $DATASETS == *' '* && $value != *'{dataset}'* ]]; then
    fail "$variable=$value: one file for several datasets ($DATASETS); write {dataset} where the name differs, or set DATASETS"
  fi
  FILE=${value//'{dataset}'/$dataset}
  FILE=${FILE//'{seed}'/$seed}
  if [[ $DRY == 0 && ! -f $FILE ]]; then fail "$variable=$value: there is no file $FILE"; fi
}

# add_pruning LABEL DATASET SEED CRITERION LOSS FLAG...: lists a pruning of the dataset's teacher, distilled from itself.
add_pruning() {
  local label=$1 dataset=$2 seed=$3 criterion=$4 loss=$5 teacher=${TEACHERS[$2]}
  shift 5
  recipe "$dataset" student
  distillation "$dataset" "$loss"
  local criterion_flags=(--prune-rates "$KEEP" --prune-mode "$criterion")
  if [[ $KEEP == *=* ]]; then criterion_flags=(--budget "$KEEP" --prune-mode "$criterion"); fi
  case ${CRITERION_INPUTS[$criterion]} in
    *' grad '* | *' importance '*) criterion_flags+=(--samp-batches 25) ;;
    *' feature_maps '*) criterion_flags+=(--samp-batches 5) ;;
  esac
  applicable "$criterion" "$loss" "$@"
  add_run pruning.py "$label" "$dataset" "$seed" "$teacher" --t-model "$MODEL" --t-path "$teacher" --s-copy-t \
    "${criterion_flags[@]}" "${DISTILLATION[@]}" "${RECIPE_FLAGS[@]}" "${APPLICABLE[@]}"
}

# applicable CRITERION LOSS ARGUMENT...: APPLICABLE becomes the arguments without those flags that would have no effect on a
# pruning by this criterion and with this loss: flags that some criterion or loss reads, and neither of these two.
applicable() {
  local read="${CRITERION_FLAGS[$1]}${LOSS_FLAGS[$2]-}" some=" ${CRITERION_FLAGS[*]} ${LOSS_FLAGS[*]} " argument applies=1
  shift 2
  APPLICABLE=()
  for argument in "$@"; do
    if [[ $argument == --* ]]; then
      applies=1
      if [[ $some == *" $argument "* && $read != *" $argument "* ]]; then applies=0; fi
    fi
    if ((applies)); then APPLICABLE+=("$argument"); fi
  done
}

# run_all: runs what add_run has listed since the last run_all and is not complete, JOBS at a time; DRY=1 prints it instead.
run_all() {
  local i status pids=() missing=()
  if ((!CHECKED)); then check_commands; fi
  for ((i = LISTED; i < ${#FOLDERS[@]}; i++)); do
    if [[ -f ${FOLDERS[i]}/summary.json ]]; then continue; fi
    if [[ $DRY == 1 ]]; then
      missing+=("${COMMANDS[i]}")
    elif [[ " ${FOLDERS[*]} " == *" ${NEEDED[i]} "* && ! -f ${NEEDED[i]}/summary.json ]]; then
      FAILED+=("$(basename "${FOLDERS[i]}"): not run, ${NEEDED[i]} is not complete")
    else
      take_slot
      echo "run $((i + 1)) of ${#FOLDERS[@]}: ${FOLDERS[i]}"
      launch "$i"
      pids[i]=$! SLOTS[SLOT]=$!
    fi
  done
  for i in "${!pids[@]}"; do
    status=0
    wait "${pids[i]}" || status=$?
    if ((status)); then FAILED+=("$(basename "${FOLDERS[i]}"): exit status $status"); fi
  done
  if ((${#pids[@]})); then collect_study; fi
  print_stage "${missing[@]}"
  LISTED=${#FOLDERS[@]}
}

# print_stage COMMAND...: prints commands that need nothing of one another, after an empty line where others must end before.
print_stage() {
  if ((!$#)); then return; fi
  if ((PRINTED)); then echo; fi
  printf '%s\n' "$@"
  PRINTED=1
}

# take_slot: waits until fewer than JOBS runs are going on; SLOT becomes the lowest number that none of them has.
take_slot() {
  local running
  while true; do
    running=" $(jobs -rp | tr '\n' ' ')" || continue # a Ctrl-C, which ends the pipe as well, is for the trap and not for set -e
    for ((SLOT = 0; SLOT < JOBS; SLOT++)); do
      if [[ -z ${SLOTS[SLOT]-} || $running != *" ${SLOTS[SLOT]} "* ]]; then return; fi
    done
    wait -n || true
    collect_study
  done
}

# launch INDEX: starts the command in the background, in a process group of its own, so that Ctrl-C reaches it through stop
# alone; with several at once every line of output begins with the name of its run. Its slot says which of the GPUs it has.
launch() {
  local command=${COMMANDS[$1]} name gpus=${#GPU_NUMBERS[@]}
  name=$(basename "${FOLDERS[$1]}")
  if ((gpus)); then command="env CUDA_VISIBLE_DEVICES=${GPU_NUMBERS[SLOT % gpus]} $command --device cuda"; fi
  set -m
  if ((JOBS > 1)); then
    name=${name//\\/\\\\} name=${name//'|'/'\|'} name=${name//'&'/'\&'} # as sed takes them for themselves
    (eval "exec $command" > >(exec sed -u "s|^|$name: |") 2>&1) &
  else
    (eval "exec $command") &
  fi
  set +m
}

# stop STATUS: asks every run to save its state and end, waits for that, and exits.
stop() {
  echo "$SCRIPT: stopping, every run saves its state first" >&2
  trap end_runs INT TERM HUP
  end_runs
  while [[ -n $(jobs -rp) ]]; do wait || true; done
  collect_study
  echo "$SCRIPT: stopped; the same command goes on from here" >&2
  exit "$1"
}

end_runs() {
  local pid
  for pid in $(jobs -rp); do kill -TERM "$pid" || true; done
}

# collect_study: puts what a report reads of the runs that are complete into STUDY, beside what it has.
collect_study() {
  local folder complete=()
  if [[ -z $STUDY || $DRY == 1 ]]; then return 0; fi # in a trap a bare return gives the status from before it
  for folder in "${FOLDERS[@]}"; do
    if [[ -f $folder/summary.json ]]; then complete+=("$folder"); fi
  done
  if ((!${#complete[@]})); then return 0; fi
  UNCOLLECTED=0
  "$PYTHON" report.py --skip-missing --collect "$STUDY" "$STUDY" "${complete[@]}" >/dev/null || UNCOLLECTED=$?
}

# finish: reports on the runs that are complete, with the tables that COMPARISONS asks for, and names those that are not. Exits
# with 1 if any failed.
finish() {
  local line report
  printf -v report '%q ' "$PYTHON" report.py --skip-missing --output "$REPORT_DIR" "${FOLDERS[@]}"
  if ((${#COMPARISONS[@]})); then report+="--compare $(printf '%q ' "${COMPARISONS[@]}")"; fi
  if [[ $DRY == 1 ]]; then print_stage "${report% }" && exit; fi
  if ((UNCOLLECTED)); then FAILED+=("report.py --collect $STUDY: exit status $UNCOLLECTED"); fi
  eval "$report" || FAILED+=("report.py: exit status $?")
  if ((${#FAILED[@]})); then
    echo "$SCRIPT: ${#FAILED[@]} failed; the same command runs them again:" >&2
    for line in "${FAILED[@]}"; do echo "  $line" >&2; done
    exit 1
  fi
}
