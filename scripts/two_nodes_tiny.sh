#!/usr/bin/env bash
# The tiny task on a Ray cluster of two nodes on this machine: one FSDP rank and
# one vLLM server on each.
#
# Starts the nodes with their own ports, folders, token, logical CPUs and one
# logical GPU each, on loopback addresses. Then it calls scripts/run_tiny.sh with
# NNODES=2 and the address, and takes the same variables and overrides. At the
# end, also after an error, Ctrl-C or TERM, it stops the processes that it started
# and no other Ray.
#
#   bash scripts/two_nodes_tiny.sh trainer.total_training_steps=2
#   METHOD=anchor bash scripts/two_nodes_tiny.sh
#
# Memory: about 10 GB. Further variables: scripts/run.sh --help.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
source scripts/lib.sh
help_or_go_on "$@"
export JOB=tiny
[[ -n "${OWN_METHOD:-}" ]] || METHOD=${METHOD:-region}
export NNODES=2 NGPUS_PER_NODE=1
unset RAY_ADDRESS
place_run "$@"
check_names "$@"
if dry_run; then exec bash scripts/run_tiny.sh "$@"; fi

enter_environment cpu
tiny_environment

FOLDER="$(mktemp -d /tmp/sayo-XXXXXX)" # short: Ray puts sockets into it, whose paths may have 107 characters
NODES=()

# Ids of the processes that were started with this mark in their environment, and of those that they started.
marked() {
  env -u SAYO_MARK grep -lzx "SAYO_MARK=$1" /proc/[0-9]*/environ 2>/dev/null | tr -dc '0-9\n' || true
}

# Sends a signal to the processes whose ids come on stdin, and waits until a mark is gone. Arguments: signal, mark, seconds.
end() {
  local i
  xargs -r kill -"$1" 2>/dev/null || true
  for ((i = 0; i < $3 * 5; i++)); do
    [[ -n "$(marked "$2")" ]] || return 0
    sleep 0.2
  done
}

stop() {
  local status=$? mark
  trap '' INT TERM
  trap - EXIT
  marked "$FOLDER/run" | end TERM "$FOLDER/run" 20
  printf '%s\n' "${NODES[@]}" | end TERM "$FOLDER/nodes" 15 # they stop what they started
  for mark in run nodes; do marked "$FOLDER/$mark" | end KILL "$FOLDER/$mark" 5; done
  rm -rf "$FOLDER"
  exit "$status"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # end a node at once
# A port that is free now; Ray chooses its other ports.
PORT="$(python3 -c 'import socket; s = socket.create_server(("127.0.0.2", 0)); print(s.getsockname()[1])')"
RAY_AUTH_TOKEN="$(python3 -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

# A node with room for its half of the run. Arguments: its number, options of ray start.
start_node() {
  local number=$1 log="$FOLDER/node-$1.log" i
  shift
  : >"$log"
  SAYO_MARK="$FOLDER/nodes" ray start "$@" --block --disable-usage-stats --temp-dir="$FOLDER/$number" \
    --node-name="node-$number" --node-ip-address="127.0.0.$((number + 1))" \
    --num-cpus=8 --num-gpus=1 --object-store-memory=250000000 >"$log" 2>&1 &
  NODES+=($!)
  for ((i = 0; i < 600; i++)); do
    ! grep -q 'Ray runtime started' "$log" || return 0
    kill -0 $! 2>/dev/null || break
    sleep 0.1
  done
  cat "$log" >&2
  refuse X06 "node $number of the Ray cluster did not start" "$log" "look at its output above (memory? ports?)"
}
start_node 1 --head --port="$PORT" --include-dashboard=false
start_node 2 --address="127.0.0.2:$PORT"
export RAY_ADDRESS="127.0.0.2:$PORT"
echo "a Ray cluster of two nodes at $RAY_ADDRESS, in $FOLDER"

SAYO_MARK="$FOLDER/run" bash scripts/run_tiny.sh "$@" & # in the background, so that the traps act at once
wait $!
