#!/usr/bin/env bash
# What scripts share: help, errors, the folder of a run, early checks, the
# environment. Sourced after `cd "$ROOT"`.
set -euo pipefail

# With the argument -h or --help: prints the header comments of the script and of the one that it sources, and exits.
# Call it first.
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

# Prints an error in the launcher's format, for what only a script knows, and exits. Arguments: code, what, where, fix.
refuse() {
  echo "SAYO-$1: $2 | at $3 | fix: $4" >&2
  exit 2
}

# Whether DRY_RUN asks for a dry run.
dry_run() {
  case "${DRY_RUN:-0}" in
    1 | true | yes) return 0 ;;
    0 | false | no) return 1 ;;
    *) refuse L30 "DRY_RUN is neither 1 nor 0" "DRY_RUN=$DRY_RUN" "set it to 1, or leave it out" ;;
  esac
}

# A value for Hydra, in quotes if it has special characters.
quoted() {
  local escaped=${1//\\/\\\\}
  if [[ "$1" =~ ^[A-Za-z0-9_./:%@+\ -]*$ ]]; then printf '%s' "$1"; else printf '"%s"' "${escaped//\"/\\\"}"; fi
}

# Sets the method, name and folder of a run: METHOD, NAME, OUT (absolute). Sets SAYO_RESUME_COMMAND, which the launcher
# prints last: the script with RESUME, its arguments and the variables that the user set. Does nothing if the calling
# script has called it. Arguments: those of the script. Needs JOB; OWN_METHOD is the method in the name of the script.
place_run() {
  [[ -z "${SAYO_RESUME_COMMAND:-}" ]] || return 0
  local name given=''
  for name in METHOD MODEL_PATH DATA NNODES NGPUS_PER_NODE RAY_ADDRESS VERL_PLATFORM; do
    [[ -z "${!name:-}" ]] || given+="$name=$(printf '%q' "${!name}") "
  done
  case "${0##*/}" in run.sh | anchor.sh) given="JOB=$JOB $given" ;; esac
  if [[ -n "${OWN_METHOD:-}" && "${METHOD:-$OWN_METHOD}" == "$OWN_METHOD" ]]; then
    METHOD=$OWN_METHOD NAME=${0##*/} NAME=${NAME#run_} NAME=${NAME%.sh}
  elif [[ -n "${METHOD:-}" ]]; then
    NAME=${METHOD}_$JOB
  else
    refuse L30 "no method is named" METHOD "METHOD=NAME of configs/method: $(cd configs/method && echo *.yaml)"
  fi
  [[ -z "${RESUME:-}" || -z "${OUT:-}" ]] ||
    refuse L68 "the folder of the run is named twice" "OUT=$OUT and RESUME=$RESUME" "leave OUT out: a resumed run stays in its folder"
  OUT=${RESUME:-${OUT:-outputs/$NAME/$(date +%Y%m%d-%H%M%S)}}
  [[ "$OUT" != "~/"* ]] || OUT=$HOME/${OUT:2} # of a file of variables, where no shell expands it
  [[ "$OUT" == /* ]] || OUT=$ROOT/$OUT
  SAYO_RESUME_COMMAND="RESUME=$(printf '%q' "$OUT") ${given}bash$(printf ' %q' "$ROOT/scripts/${0##*/}" "$@")"
  export METHOD NAME OUT SAYO_RESUME_COMMAND
}

# Sets the variables of a run on a CPU.
tiny_environment() {
  export VERL_PLATFORM=cpu
  export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false
  export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
  # Two cores and half a dozen processes: no idle workers beside them, no compiler, one thread each.
  export RAY_enable_worker_prestart=0 RAY_prestart_worker_first_driver=0
  export TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1
}

# Makes an environment, or finds it, and puts its commands (sayo, ray) first. Argument: cpu, gpu, or none for the one of
# this machine.
enter_environment() {
  bash scripts/setup_env.sh "$@"
  VIRTUAL_ENV="$(bash scripts/setup_env.sh --where "$@")"
  export PATH="$VIRTUAL_ENV/bin:$PATH" VIRTUAL_ENV
}

# Runs a command to its end and returns its exit code. INT, TERM and HUP end the command, then this script with 130, 143 or
# 129. It runs in the background, because bash handles no signal while a command runs in front; Ctrl-C does not reach it
# there, so that it gets TERM.
run_to_its_end() {
  local child status=0 stopped=0
  "$@" &
  child=$!
  trap 'stopped=130; kill -TERM "$child" 2>/dev/null || true' INT
  trap 'stopped=143; kill -TERM "$child" 2>/dev/null || true' TERM
  trap 'stopped=129; kill -TERM "$child" 2>/dev/null || true' HUP
  while kill -0 "$child" 2>/dev/null; do # a signal ends wait, not the command
    status=0
    wait "$child" || status=$?
  done
  trap - INT TERM HUP
  ((!stopped)) || exit "$stopped"
  return "$status"
}

# Enters the environment of this machine, unless the active Python has the modules that are named.
ready_python() {
  python3 -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@" && return
  local stack=() # of this machine
  [[ -z "${RAY_ADDRESS:-}" ]] || stack=(gpu)
  ! dry_run || stack=(cpu)
  enter_environment "${stack[@]}"
}

# Refuses, before minutes are spent on an environment: unknown names of a job or a method, variables that no script
# reads, folders that do not exist. Needs any Python from 3.10 on. Call it after place_run, with the same arguments.
check_names() {
  local python dry=()
  ! dry_run || dry=(sayo.dry_run=True)
  for python in python3 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    "$python" -m sayo_verl.launch.names --config-dir configs +job="$JOB" +method="$METHOD" "${dry[@]}" "$@"
    return
  done
}
