#!/usr/bin/env bash
# What scripts share: their help, and the command that resumes a run. Sourced after `cd "$ROOT"`.
set -euo pipefail

# Prints the header comments of the script and of the one it sources, and ends, where -h or --help is an argument. Call
# it first.
help_or_go_on() {
  local argument i
  for argument; do
    case "$argument" in
      -h | --help)
        for ((i = ${#BASH_SOURCE[@]} - 1; i > 0; i--)); do
          sed -n '2,/^set/s/^# \{0,1\}//p' "$(dirname "${BASH_SOURCE[0]}")/${BASH_SOURCE[i]##*/}"
          ((i == 1)) || echo
        done
        exit 0
        ;;
    esac
  done
}

# Sets what a run is called and where it lies: METHOD, NAME, OUT (absolute), and SAYO_RESUME_COMMAND, which the launcher
# prints last: the script with RESUME, its arguments and the variables that were set from outside. Nothing is left to do
# where the calling script has done it. Arguments: those of the script. Needs JOB; OWN_METHOD is what a script is named for.
place_run() {
  [[ -z "${SAYO_RESUME_COMMAND:-}" ]] || return 0
  local name given=''
  for name in METHOD MODEL_PATH DATA NNODES NGPUS_PER_NODE; do
    [[ -z "${!name:-}" ]] || given+="$name=$(printf '%q' "${!name}") "
  done
  [[ "${0##*/}" != run.sh ]] || given="JOB=$JOB $given"
  if [[ -n "${OWN_METHOD:-}" && "${METHOD:-$OWN_METHOD}" == "$OWN_METHOD" ]]; then
    METHOD=$OWN_METHOD NAME=${0##*/run_} NAME=${NAME%.sh}
  else
    NAME=${METHOD:?names a file of configs/method}_$JOB
  fi
  OUT=${RESUME:-${OUT:-outputs/$NAME/$(date +%Y%m%d-%H%M%S)}}
  [[ "$OUT" == /* ]] || OUT=$ROOT/$OUT
  SAYO_RESUME_COMMAND="RESUME=$(printf '%q' "$OUT") ${given}bash$(printf ' %q' "$ROOT/scripts/${0##*/}" "$@")"
  export METHOD NAME OUT SAYO_RESUME_COMMAND
}
