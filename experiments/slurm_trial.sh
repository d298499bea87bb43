#!/usr/bin/env bash
# On a real Slurm of one node: one run by two processes (srun); then a sweep: submit, preempt, requeue,
# resume, report.
#
#     sudo PYTHON=.venv/bin/python experiments/slurm_trial.sh NEW_FOLDER [processes]
#
# With "processes" only the run by two processes.
# Needs root, Debian's packages slurm-wlm and munge, and a Python with pmoe_jax[cluster].
# Starts munged, slurmctld and slurmd for itself, and ends them when it is done. Its two small
# programs on the embedded digits take some minutes on two idle cores; after two hours it gives up.
# experiments/results/slurm_trial.log is what it printed once: the sweep, and later the two processes.
set -euo pipefail
work=$(realpath -m "${1:?give a new folder}")
python=$(realpath -s "${PYTHON:-$(command -v python3)}")
mkdir "$work" "$work/state" "$work/spool"
# First of all: no command below may reach another cluster that this machine belongs to. While the
# file does not exist yet, or its slurmctld does not run, Slurm's commands fail.
export SLURM_CONF=$work/slurm.conf
unset SLURM_CONF_SERVER SLURM_CLUSTERS SLURM_CLUSTER_NAME
host=$(hostname -s)
cpus=$(nproc)
started=()
finish() {
  if [ "${#started[@]}" -gt 0 ]; then
    timeout 20 scancel --user=root 2>/dev/null || true
    for _ in $(seq 30); do # Their processes are slurmd's to end.
      [ -n "$(timeout 20 squeue --noheader 2>/dev/null)" ] || break
      sleep 1
    done
  fi
  for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
  for _ in $(seq 20); do
    [ -n "$(jobs -r)" ] || break
    sleep 1
  done
  for pid in $(jobs -pr); do kill -9 "$pid" 2>/dev/null || true; done
  wait
}
trap finish EXIT
say() { echo "--- $(date +%T) $*"; }
in_time() {
  if [ "$SECONDS" -gt 7200 ]; then
    say "gives up after two hours"
    exit 1
  fi
}

cat > "$work/slurm.conf" <<CONF
ClusterName=trial
SlurmctldHost=$host
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
NodeName=$host CPUs=$cpus State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=INFINITE
CONF

# With a key and a socket of its own, so that it meets no other one.
head -c 128 /dev/urandom > "$work/munge.key"
chmod 600 "$work/munge.key"
munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" \
  --pid-file="$work/munged.pid" --seed-file="$work/munge.seed" --log-file="$work/munged.log" \
  > "$work/munged.out" 2>&1 & started+=($!)
slurmctld -D > "$work/slurmctld.out" 2>&1 & started+=($!)
slurmd -D > "$work/slurmd.out" 2>&1 & started+=($!)
for _ in $(seq 60); do
  timeout 20 sinfo --noheader --format=%t 2>/dev/null | grep -q idle && break
  sleep 1
done
timeout 20 sinfo --noheader --format=%t | grep -q idle
sinfo --version
sinfo

cat > "$work/grid.py" <<'GRID'
from pmoe_jax import config as config_lib
from pmoe_jax import grid


def get_config():
    return grid.with_fields(config_lib.default(), {
        "data.name": "digits", "data.image_size": 16, "num_seeds": 1, "model.width": 1,
        "model.num_experts": 2, "model.patches_per_expert": 4, "model.bn_momentum": 0.9,
        "train.epochs": 8, "train.batch_size": 64, "evaluation.batch_size": 360,
        "evaluation.every_epochs": 8, "checkpoint.every_steps": 5,
    })


def get_grid():
    return [{"name": "clean"}, {"name": "square", "trigger.name": "square", "poison.rate": 0.1}]
GRID

command='import sys; from pmoe_jax.cli import main; sys.exit(main(sys.argv[1:]))'
pmoe() { "$python" -c "$command" "$@"; }
job_of() { sed 's/.*"job": "\([0-9]*\)".*/\1/' "$work/sweep/jobs/$1.json"; }
until_saved() { # that there is a checkpoint, or the sweep has ended
  until grep -qs checkpoints "$work/sweep/runs/$1/manifest.json"; do
    kill -0 "$sweep"
    in_time
    sleep 0.2
  done
}

say "two processes train one run: srun -n2 pmoe train"
timeout 1800 srun --partition=low -n2 --label "$python" -c "$command" train \
  --config="$work/grid.py" --workdir="$work/run" --noprogress --config.num_seeds=2 \
  --config.train.epochs=1 --config.checkpoint.every_steps=0 \
  --config.trigger.name=square --config.poison.rate=0.1 > "$work/run.out" 2> "$work/run.err" ||
  { cat "$work/run.err"; exit 1; }
sed "s#$work/##g" "$work/run.out" "$work/run.err"
grep -q "2 members on 2x1 devices" "$work/run.err"
grep -q "^0: .*ASR" "$work/run.out"
if grep -q "^1: .*ASR" "$work/run.out"; then exit 1; fi # One table: the first one's.
if [ "${2:-}" = processes ]; then exit 0; fi

say "submit"
pmoe sweep --config="$work/grid.py" --workdir="$work/sweep" --max_members=1 --launcher=slurm \
  --launcher_options="slurm_partition=low,cpus_per_task=$cpus" > "$work/table.txt" &
sweep=$!
started+=("$sweep")
until_saved 000_digits_pmoe_w1
squeue
say "the first job is preempted by one of a partition of higher priority"
sbatch --partition=high --cpus-per-task="$cpus" --output=/dev/null --wrap "sleep 5"
sleep 3
squeue
until_saved 001_digits_pmoe_w1
say "the second job is requeued by hand"
scontrol requeue "$(job_of 001_digits_pmoe_w1)"
sleep 3
squeue
while kill -0 "$sweep" 2>/dev/null; do
  in_time
  sleep 1
done
wait "$sweep"
say "the sweep has ended"
cat "$work/table.txt"
say "what the jobs' logs say"
for name in 000_digits_pmoe_w1 001_digits_pmoe_w1; do
  echo "$name, job $(job_of $name):"
  grep -h "^submitit.*Caught signal\|Requeued\|resuming\|CANCELLED" \
    "$work/sweep/jobs/$(job_of $name)"_*_log.err | sed "s#$work/##g" || true
  "$python" - "$work/sweep/runs/$name/provenance.json" <<'SESSIONS'
import json
import sys

sessions = len(json.load(open(sys.argv[1]))["sessions"])
print(f"trained in {sessions} sessions")
sys.exit(sessions < 2)
SESSIONS
done
say "report"
pmoe report "$work/sweep" --output="$work/report"
ls "$work/report"
