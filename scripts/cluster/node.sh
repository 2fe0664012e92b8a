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
# It was run on one machine, as two nodes on loopback addresses, not on two machines.
set -euo pipefail
: "${NODE_RANK:?}" "${NNODES:?}" "${HEAD_IP:?}"
PORT=${RAY_PORT:-6379}
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
read -ra OPTIONS <<<"${RAY_OPTIONS:-}"

head_listens() {
  (exec 3<>"/dev/tcp/$HEAD_IP/$PORT") 2>/dev/null
}

wait_for_head() { # 10 minutes at most; on the first machine, while its own head runs
  local i
  for ((i = 0; i < 600; i++)); do
    if [[ -n "$NODE" ]] && ! kill -0 "$NODE" 2>/dev/null; then
      wait "$NODE" || exit # with its status
      return 1
    fi
    ! head_listens || return 0
    sleep 1
  done
  echo "no Ray head answers at $HEAD_IP:$PORT" >&2
  return 1
}

NODE=''
leave() {
  local address_file="${RAY_TMPDIR:-${TMPDIR:-/tmp}}/ray/ray_current_cluster"
  [[ -n "$NODE" ]] || return 0
  { kill "$NODE" 2>/dev/null && wait "$NODE"; } || true
  # Otherwise later runs on this machine would look for this cluster: only `ray stop`, which stops every Ray, removes it.
  [[ "$(cat "$address_file" 2>/dev/null)" != "$HEAD_IP:$PORT" ]] || rm -f "$address_file"
}
trap leave EXIT
trap 'exit 143' TERM

if ((NODE_RANK > 0)); then
  wait_for_head
  ray start --block --address="$HEAD_IP:$PORT" "${OPTIONS[@]}" &
  NODE=$!
  FAILED=0
  while kill -0 "$NODE" 2>/dev/null; do
    # The head ended, most likely with the command, whose status the first machine returns. One failure may be a short
    # loss of the network. Ray's own limit is 60 s, and slurm.sh ends the others after 30 s.
    if head_listens; then FAILED=0; else ((++FAILED < 5)) || exit 0; fi
    sleep 4
  done
  wait "$NODE"
  exit
fi
if head_listens; then
  echo "another process listens at $HEAD_IP:$PORT: end it, or set RAY_PORT to another port on all machines" >&2
  exit 1
fi
ray start --block --head --node-ip-address="$HEAD_IP" --port="$PORT" --include-dashboard=false "${OPTIONS[@]}" &
NODE=$!
wait_for_head
RAY_ADDRESS="$HEAD_IP:$PORT" "$@" sayo.wait_for_nodes=600
