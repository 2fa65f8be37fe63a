#!/usr/bin/env bash
# Run launch/slurm.sbatch under a real SLURM: a cluster of one node that this script starts on this machine and stops
# again, with two tasks and no GPU. A run is stopped by SIGTERM, requeued, cancelled, submitted again and trained to its
# end. It must then hold the same parameters and training state, to the bit, as one that was never stopped.
# Needs root, dalle-jax on the PATH and Debian's SLURM: apt-get install slurm-wlm munge. Six minutes on two idle cores.
#   sudo tests/launch/slurm_check.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
((EUID == 0)) || { echo "expected root, which starts SLURM's daemons, got user $EUID: use sudo" >&2 && exit 2; }

place=$(mktemp -d)
node=$(hostname -s)
export SLURM_CONF="$place/slurm.conf" JAX_PLATFORMS=cpu
stop() {
  scancel --user=root --signal=KILL --full || true
  for daemon in slurmd slurmctld munged; do
    kill "$(cat "$place/$daemon.pid")" || true
  done
}
trap stop EXIT

cat > "$SLURM_CONF" <<CONF
ClusterName=check
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthInfo=socket=$place/munge.socket
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
KillWait=60
NodeName=$node NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
CONF
# Two GPUs to count; there is no device behind them.
printf 'Name=gpu File=%s\n' /dev/null /dev/zero > "$place/gres.conf"
mkdir "$place/state" "$place/spool"
chmod 755 "$place"
head -c 1024 /dev/urandom > "$place/munge.key"
chmod 400 "$place/munge.key"
munged --force --key-file="$place/munge.key" --socket="$place/munge.socket" --pid-file="$place/munged.pid" \
  --log-file="$place/munged.log" --seed-file="$place/munged.seed"
slurmctld -c
slurmd -c

state() { scontrol --oneliner show job "$1" | grep -oP "(?<=$2=)\S+"; }
await() { # SECONDS WHAT COMMAND...: until the command succeeds
  local until=$((SECONDS + $1)) what=$2
  until "${@:3}"; do
    if ((SECONDS > until)); then
      echo "FAILED: no $what" >&2
      tail --lines=40 "$place"/*.log >&2
      exit 1
    fi
    sleep 0.5
  done
}
is() { [[ $(state "$1" "$2") == "$3" ]]; }
submit() { # WORKDIR WORD...: prints the job's number
  sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1 --time=30 \
    --output="$place/%j.log" launch/slurm.sbatch configs/dvae.py:demo "$place/$1" --config.run.data.train=scenes:train@64 \
    --config.run.data.validation= --config.run.steps=120 --config.run.checkpoint_every=20 --config.run.log_every=10 "${@:2}"
}
kept() { (cd "$place/$1/checkpoints" && echo *); }
saved() { compgen -G "$place/$1/checkpoints/$2" > /dev/null; }

await 30 "idle node" eval 'sinfo --noheader --format=%T | grep --quiet idle'
sinfo --noheader --format "%n %T %c cores %G"
job=$(submit straight)
await 900 "end of the straight run" is "$job" JobState COMPLETED
echo "straight run: done in $(state "$job" RunTime)"

job=$(submit stopped)
await 600 "checkpoint of update 20" saved stopped 20
scancel --signal=TERM "$job"
began=${EPOCHREALTIME/./}
await 120 "requeue" is "$job" Restarts 1
took=$(((${EPOCHREALTIME/./} - began) / 1000))
echo "SIGTERM: saved, ended and requeued after $took ms; checkpoints: $(kept stopped)"
await 60 "waiting job" is "$job" JobState PENDING
sleep 3 # in the second of its requeue a job can't start: "Job credential revoked"
scontrol update jobid="$job" StartTime=now # SLURM would wait two minutes
await 600 "checkpoint of update 60" saved stopped 60
scancel "$job"
await 120 "end by scancel" is "$job" JobState CANCELLED
echo "scancel: ended; checkpoints: $(kept stopped)"

job=$(submit stopped)
await 900 "end of the resumed run" is "$job" JobState COMPLETED
echo "submitted again: done in $(state "$job" RunTime)"

job=$(submit impossible --config.batch_size=3)
await 600 "failure of an impossible run" is "$job" JobState FAILED
[[ $(state "$job" ExitCode) == 2:0 && $(state "$job" Restarts) == 0 ]]
echo "impossible run: ended with 2, not requeued"

for workdir in straight stopped; do
  dalle-jax inspect "$place/$workdir" --json > "$place/$workdir.json"
done
python3 - "$place/straight.json" "$place/stopped.json" <<'PYTHON'
import json
import sys

found = [json.load(open(path)) for path in sys.argv[1:]]
for run in found:
    print(*(f"{key} {run[key]}" for key in ("step", "parameters_sha256", "state_sha256")))
sys.exit(any(found[0][key] != found[1][key] for key in ("step", "parameters_sha256", "state_sha256")))
PYTHON
echo "both runs hold the same bits; logs are in $place"
