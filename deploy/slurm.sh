#!/usr/bin/env bash
# A gyre command on a Slurm allocation: starts a Ray node on each of its machines, runs the command on the first, and
# ends as it ends.  sbatch --nodes 4 --gpus-per-node 8 deploy/slurm.sh train recipes/mine.yaml cluster.workers=32 …
#
# Submit it from the working tree. The environment (VENV, here .venv) and GYRE_HOME must lie on storage that all nodes
# share. Before the time limit, and when the allocation is taken back, a training gets SIGTERM and writes a checkpoint;
# `gyre train RECIPE --resume RUN`, submitted the same way, goes on from it.
#SBATCH --job-name=gyre
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --signal=B:TERM@180
#SBATCH --output=gyre-%j.log
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: sbatch deploy/slurm.sh COMMAND …" >&2; exit 2; }
: "${SLURM_JOB_ID:?run it with sbatch}"

PATH="${VENV:-$PWD/.venv}/bin:$PATH"
export PATH GYRE_HOME="${GYRE_HOME:-$PWD/runs}" RAY_USAGE_STATS_ENABLED=0
mkdir -p "$GYRE_HOME"

# The cluster's token: a file of this job that only its owner can read, never a word of a command line.
private=$(mktemp -d "$GYRE_HOME/.slurm-$SLURM_JOB_ID-XXXXXX")
chmod 700 "$private"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' > "$private/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on() { srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" "${@:2}"; }
# Two jobs may share a machine: ports follow the job's number.
port=$((20000 + SLURM_JOB_ID % 10000 * 2))
head_ip=${HEAD_IP:-$(on "${nodes[0]}" hostname -I | cut -d' ' -f1)}
address="$head_ip:$port"

# What runs on a node. Its own CPUs, GPUs and temporary folder are known there; gloo and NCCL are told the card of the
# default route unless the user names one.
# shellcheck disable=SC2016  # expanded on the node
start='
card=$(ip -o -4 route show to default 2>/dev/null | sed -n "s/.* dev \([^ ]*\).*/\1/p" | head -n1)
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$card}"
[ -n "$GLOO_SOCKET_IFNAME" ] || unset GLOO_SOCKET_IFNAME
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-${GLOO_SOCKET_IFNAME:-}}"
[ -n "$NCCL_SOCKET_IFNAME" ] || unset NCCL_SOCKET_IFNAME
ulimit -n "$(ulimit -Hn)"
exec ray start --block --temp-dir="${TMPDIR:-/tmp}/gyre-$SLURM_JOB_ID" --dashboard-agent-listen-port=0 \
  --num-cpus="${SLURM_CPUS_ON_NODE:-$(nproc)}" ${SLURM_GPUS_ON_NODE:+--num-gpus="$SLURM_GPUS_ON_NODE"} "$@"
'
started=()
start_node() {
  on "$1" bash -c "$start" ray-node "${@:2}" > "$private/$1.log" 2>&1 &
  started+=("$!")
}

# shellcheck disable=SC2329  # called by the trap
finish() {
  trap - EXIT
  [ ${#started[@]} -eq 0 ] || kill "${started[@]}" 2>/dev/null || true
  wait || true
  rm -rf "$private"
}
trap finish EXIT

start_node "${nodes[0]}" --head --port="$port" --node-ip-address="$head_ip" \
  --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1))
for node in "${nodes[@]:1}"; do start_node "$node" --address="$address"; done

# A node that ends before all have joined is told with the last lines of its log.
until python - "$address" "${#nodes[@]}" <<'PYTHON'
import sys

from ray._raylet import GcsClient

try:
    alive = sum(node.state == 0 for node in GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5).values())
except Exception:  # noqa: BLE001  not up yet
    alive = 0
sys.exit(alive < int(sys.argv[2]))
PYTHON
do
  for i in "${!nodes[@]}"; do
    kill -0 "${started[i]}" 2>/dev/null || {
      echo "no Ray node on ${nodes[i]}:" >&2
      tail -n 20 "$private/${nodes[i]}.log" >&2
      exit 1
    }
  done
  sleep 2
done
echo "Ray on ${#nodes[@]} nodes: ${nodes[*]}"

export RAY_ADDRESS="$address"
python -m cluster.cli "$@" &
command=$!
trap 'kill -TERM "$command"' TERM INT
code=0
wait "$command" || code=$?
# A signal ends `wait` at once, the command only when it has written its checkpoint.
while kill -0 "$command" 2>/dev/null; do wait "$command" || code=$?; done
exit "$code"
