#!/usr/bin/env bash
# Runs a study on a Slurm cluster: a task for each run, in job arrays, teachers before students, the report last.
#   scripts/slurm.sh [OPTION OF SBATCH...] run_pruning.sh [ARGUMENT...]
#   JOBS=16 scripts/slurm.sh --partition=gpu --gres=gpu:1 --time=2:00:00 run_pruning.sh --dataset cifar10
# A task whose time is up saves its state, is queued again, and goes on. What is complete or queued is not submitted again.
# Variables: JOBS=n has n tasks of a kind at a time, GRACE=120 seconds are left for saving, SLURM_DIR=./slurm is where lists
# and output of the tasks go; and those of the script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "slurm.sh: error: $*" >&2
  exit 2
}

OPTIONS=()
until [[ ${1-} == *run_*.sh && -f scripts/$(basename "$1") ]]; do
  case ${1-} in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
    '') fail "name one of the scripts: $(cd scripts && echo run_*.sh)" ;;
  esac
  OPTIONS+=("$1")
  shift
done
STUDY=$(basename "$1" .sh)
shift
GRACE=${GRACE:-120} SLURM_DIR=${SLURM_DIR:-./slurm}
SLURM_DIR=$(realpath -m "$SLURM_DIR")
[[ $GRACE =~ ^[1-9][0-9]*$ ]] || fail "GRACE=$GRACE: must be a whole number of seconds"
for command in sbatch squeue scontrol; do
  command -v "$command" >/dev/null || fail "$command: not found here; call this where the commands of Slurm are"
done
LIST=$(DRY=1 "scripts/$STUDY.sh" "$@") # commands, line by line, with an empty line where those before must have ended

# find_queued: QUEUED holds the job of each command that is already in the queue
find_queued() {
  local job task list
  declare -gA QUEUED=()
  while IFS='|' read -r job task list; do
    if [[ $task =~ ^[0-9]+$ && -f $list ]]; then QUEUED[$(sed -n "${task}p" "$list")]=$job; fi
  done < <(squeue --me --array --noheader --format='%F|%K|%k')
}

# submit COMMAND...: submits those that are not queued, to start when all that EARLIER names has ended; adds their jobs to EARLIER.
# A report that is queued comes too early for what is submitted now.
submit() {
  local command list job missing=() jobs=()
  for command in "$@"; do
    if [[ -z ${QUEUED[$command]-} || ($command == *\ report.py\ * && -n $SUBMITTED) ]]; then
      missing+=("$command")
    else
      jobs+=("${QUEUED[$command]}")
    fi
  done
  if ((${#missing[@]})); then
    mkdir -p "$SLURM_DIR"
    list=$(mktemp "$SLURM_DIR/$STUDY-XXXXXX")
    printf '%s\n' "${missing[@]}" >"$list"
    job=$(sbatch --parsable --job-name="$STUDY" --comment="$list" --array="1-${#missing[@]}${JOBS:+%$JOBS}" --requeue \
      --signal="B:USR1@$GRACE" --chdir="$PWD" --output="$SLURM_DIR/%A_%a.txt" --open-mode=append \
      ${EARLIER:+--dependency="afterany:$EARLIER"} "${OPTIONS[@]}" scripts/slurm_task.sh "$list")
    jobs+=("${job%%;*}") SUBMITTED=1
    echo "job ${job%%;*}: ${#missing[@]} tasks, ${missing[0]%% --*} ..."
  fi
  for job in "${jobs[@]}"; do
    if [[ :$EARLIER: != *:$job:* ]]; then EARLIER=${EARLIER:+$EARLIER:}$job; fi
  done
}

find_queued
EARLIER='' SUBMITTED='' STAGE=()
while IFS= read -r line; do
  if [[ -n $line ]]; then
    STAGE+=("$line")
  else
    submit "${STAGE[@]}"
    STAGE=()
  fi
done <<<"$LIST"
submit "${STAGE[@]}"
if [[ -z $SUBMITTED ]]; then echo "all that is missing is queued"; fi
