#!/usr/bin/env bash
# Starts a Ray node. Call it once on every machine of an allocation; on the first it also runs the command, and ends with it.
#
#   NODE_RANK=0 NNODES=2 HEAD_IP=10.0.0.1 RAY_AUTH_TOKEN=... bash scripts/cluster/node.sh bash scripts/run_sayo_qwen3vl_8b.sh
#
#   NODE_RANK        0 on the first machine, 1, 2, ... on the others
#   NNODES           number of machines
#   HEAD_IP          address of the first machine that the others reach
#   RAY_AUTH_TOKEN   a secret, the same on all machines; or the same ~/.ray/auth_token
#   RAY_PORT         6379 if it is not set
#   RAY_OPTIONS      further options of ray start, such as --num-gpus=8
#
# Run on one machine, as two nodes on loopback addresses, and not on two machines.
set -euo pipefail
: "${NODE_RANK:?}" "${NNODES:?}" "${HEAD_IP:?}"
PORT=${RAY_PORT:-6379}
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
read -ra OPTIONS <<<"${RAY_OPTIONS:-}"

head_listens() {
  (exec 3<>"/dev/tcp/$HEAD_IP/$PORT") 2>/dev/null
}

wait_for_head() { # 10 minutes at most
  local i
  for ((i = 0; i < 600; i++)); do
    ! head_listens || return 0
    sleep 1
  done
  echo "no Ray head answers at $HEAD_IP:$PORT" >&2
  return 1
}

NODE=''
trap '[[ -z "$NODE" ]] || { kill "$NODE" 2>/dev/null && wait "$NODE"; } || true' EXIT
trap 'exit 143' TERM

if ((NODE_RANK > 0)); then
  wait_for_head
  ray start --block --address="$HEAD_IP:$PORT" "${OPTIONS[@]}" &
  NODE=$!
  while kill -0 "$NODE" 2>/dev/null; do
    head_listens || exit 0 # it ended with the command
    sleep 5
  done
  wait "$NODE"
  exit
fi
ray start --block --head --node-ip-address="$HEAD_IP" --port="$PORT" --include-dashboard=false "${OPTIONS[@]}" &
NODE=$!
wait_for_head
RAY_ADDRESS="$HEAD_IP:$PORT" "$@" sayo.wait_for_nodes=600
