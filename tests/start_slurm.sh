#!/usr/bin/env bash
# Starts a Slurm cluster of one controller and one or two nodes on this machine, with all that it writes in FOLDER:
#   tests/start_slurm.sh FOLDER [NODES]
#   export SLURM_CONF=FOLDER/slurm.conf
# Its daemons go on until they are killed; their process numbers are in FOLDER/*.pid. For root, with Debian's slurm-wlm and munge.
set -euo pipefail
folder=$(realpath "$1") nodes=${2:-1}
port=$((20000 + $$ % 20000))
user=$(id -un)
mkdir -p "$folder"/{state,spool}

dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none
chmod 600 "$folder/munge.key"
chmod 755 "$folder"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"

cat >"$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=1
MinJobAge=300
KillWait=10
ReturnToService=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
echo 'CgroupPlugin=cgroup/v1' >"$folder/cgroup.conf"
for ((i = 1; i <= nodes; i++)); do
  echo "NodeName=node$i NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=2" >>"$folder/slurm.conf"
done

export SLURM_CONF=$folder/slurm.conf
slurmctld -f "$SLURM_CONF"
for ((i = 1; i <= nodes; i++)); do slurmd -f "$SLURM_CONF" -N "node$i"; done
for ((i = 0; i < 60; i++)); do
  if (($(sinfo --noheader --Node --states=idle 2>/dev/null | wc -l) == nodes)); then exit; fi
  sleep 0.5
done
echo "no node came up; see $folder/*.log" >&2
exit 1
