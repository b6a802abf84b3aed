#!/usr/bin/env bash
# A task of slurm.sh: runs the command in the line of LIST that has the task's number.
# USR1, which comes some time before the time limit, makes the run save its state and queues the task again. TERM makes it save
# its state and end. A command that begins with srun may run on many nodes.
set -uo pipefail
LIST=$1
command=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$LIST")
echo "$(date '+%F %T') on $(hostname), attempt $((${SLURM_RESTART_COUNT:-0} + 1)): $command"

# end_run: asks the run to save its state and end; srun itself would kill it at once
# shellcheck disable=SC2329 # called by the traps
end_run() {
  if [[ $command == srun\ * ]]; then scancel --signal=TERM "$SLURM_JOB_ID"; else kill -TERM "$run"; fi
}

is_out_of_time=0
trap 'is_out_of_time=1; end_run' USR1
trap end_run TERM INT
eval "exec $command" &
run=$!
wait "$run" # ends early where a signal comes
status=$?
while kill -0 "$run" 2>/dev/null; do
  wait "$run"
  status=$?
done
echo "$(date '+%F %T') exit status $status"
if ((is_out_of_time && status)); then scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
exit "$status"
