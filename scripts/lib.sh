#!/usr/bin/env bash
# What scripts share: their help, where they write, what they resume, where their files lie. Sourced after `cd "$ROOT"`.
set -euo pipefail

# Prints the script's header comment and ends it, where -h or --help is among its arguments. To be called first.
help_or_go_on() {
  local argument
  for argument; do
    case "$argument" in
      -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$(dirname "${BASH_SOURCE[0]}")/${0##*/}" && exit 0 ;;
    esac
  done
}

# Prints NAME=value of every setting of this script that was given from outside: a resumed run needs the same ones.
# To be called before the script sets its defaults.
given_settings() {
  local name names script="$ROOT/scripts/${0##*/}" # $0 itself may be relative to the folder before `cd "$ROOT"`
  names=$(grep -oE '([A-Z_]+)=\$\{\1:-' "$script" | cut -d = -f 1 | sort -u) || {
    echo "cannot read the settings of $script" >&2
    return 1
  }
  for name in $names; do
    case "$name" in OUT | RESUME) continue ;; esac
    [[ ! -v $name ]] || printf '%s=%q ' "$name" "${!name}"
  done
}

# Sets OUT (absolute), ATTEMPT (empty, or -2, -3, ... of a resumed run), VERL_FILE_LOGGER_PATH and SAYO_RESUME_COMMAND,
# the command that the launcher prints last. Arguments: those of the script.
place_output() {
  OUT=${RESUME:-$OUT} ATTEMPT=
  [[ "$OUT" == /* ]] || OUT="$ROOT/$OUT" # workers may run elsewhere
  if [[ -n "$RESUME" ]]; then
    # With nothing there at all, verl would begin a new run. What is there is for the launcher to judge.
    if [[ ! -e "$OUT/checkpoints/latest_checkpointed_iteration.txt" ]] &&
      ! compgen -G "$OUT/checkpoints/global_step_*" >/dev/null; then
      echo "SAYO-L44: there is no checkpoint to resume | at $OUT/checkpoints |" \
        "fix: name the folder of a run that saved some (SAVE_FREQ=...), or leave RESUME out to begin a new run" >&2
      exit 2
    fi
    local n=2
    while [[ -e "$OUT/metrics-$n.jsonl" || -e "$OUT/run-$n.json" ]]; do n=$((n + 1)); done
    ATTEMPT=-$n
  fi
  export VERL_FILE_LOGGER_PATH="${VERL_FILE_LOGGER_PATH:-$OUT/metrics$ATTEMPT.jsonl}"
  if [[ -s "$VERL_FILE_LOGGER_PATH" ]]; then
    echo "SAYO-L15: the metrics file belongs to another run and would be overwritten | at $VERL_FILE_LOGGER_PATH |" \
      "fix: choose a new output folder (OUT=...); to resume that run: RESUME=$OUT instead of OUT" >&2
    exit 2
  fi
  SAYO_RESUME_COMMAND="RESUME=$(printf '%q' "$OUT") ${GIVEN}bash$(printf ' %q' "$ROOT/scripts/${0##*/}" "$@")"
  export SAYO_RESUME_COMMAND
}

# Prints a path, or a list of paths [a,b], absolute: verl reads them on whatever machine its workers are. What has a scheme,
# a quote or a ~ in front is left as it is.
absolute() {
  local part made=() parts
  IFS=, read -ra parts <<<"${1//[\[\]]/}"
  for part in "${parts[@]}"; do
    part=${part# }
    case "$part" in
      /* | *://* | \'* | \"* | \~*) made+=("$part") ;;
      *) made+=("$ROOT/$part") ;;
    esac
  done
  if [[ "$1" == \[* ]]; then (IFS=, && printf '[%s]' "${made[*]}"); else printf '%s' "${made[0]-}"; fi
}

# Refuses several nodes without a cluster: Ray would start one on this machine and wait for GPUs that it does not have.
# Arguments: those of the script.
need_cluster() {
  if [[ "$NNODES" != 1 && "$DRY_RUN" != 1 && -z "${RAY_ADDRESS:-}" && " $*" != *ray_init.address=* ]]; then
    echo "SAYO-L55: several nodes need a Ray cluster that is up, and no address of one is given | at NNODES | got $NNODES |" \
      "fix: start one (ray start) and give its address: RAY_ADDRESS=auto NNODES=$NNODES bash ... on one of its nodes" >&2
    exit 2
  fi
}

# Makes the paths of a job's data and of a model in a folder absolute. Shards of a folder DATA are lists as verl takes
# them; where there are none, the pattern itself, which the launcher then refuses.
place_inputs() {
  shards() { (IFS=, && files=("$DATA/$1"-*.parquet) && printf '[%s]' "${files[*]}"); }
  if [[ -n "$DATA" ]]; then TRAIN_FILE="${TRAIN_FILE:-$(shards train)}" VAL_FILE="${VAL_FILE:-$(shards val)}"; fi
  TRAIN_FILE=$(absolute "$TRAIN_FILE") VAL_FILE=$(absolute "$VAL_FILE")
  [[ ! -d "$MODEL_PATH" ]] || MODEL_PATH=$(absolute "$MODEL_PATH")
}
