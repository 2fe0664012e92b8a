#!/usr/bin/env bash
# Builds the environment that sayo-verl runs in, or reuses it.
#
#   bash scripts/setup_env.sh [cpu|gpu]
#       default: gpu where `nvidia-smi -L` lists a GPU, else cpu
#   bash scripts/setup_env.sh --where cpu    print the folder and do nothing
#
# Needs python3.11 with pip. Everything goes into .venv (cpu) or .venv-gpu, so
# that the tiny task and the tests can run beside a GPU environment; nothing
# outside the repository is changed. An environment that fits is reused; one of
# another state of pyproject.toml is updated; an unfinished one is built anew. One
# that another checkout made is refused and not changed.
#
# The gpu stack builds flash-attn after torch, which needs nvcc of CUDA 13 and
# takes minutes on 64 cores, an hour or more on few. Without nvcc the script stops
# before it downloads anything.
#
#   SAYO_VENV             another folder (a relative path counts from the root of
#                         the repository)
#   SAYO_TORCH_INDEX_URL  index of torch's CPU build, used if the configured
#                         package index lacks it
#   SAYO_FLASH_ATTN       0: without flash-attn (the plan of a run names the
#                         cost); or a wheel of it to install
#   CUDA_HOME             the CUDA toolkit, if nvcc is neither on PATH nor in
#                         /usr/local/cuda
#   MAX_JOBS              compilers at once for flash-attn (default: by cores and
#                         by 9 GB of memory each)
set -euo pipefail

# pip would take packages on these paths for installed ones.
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
source scripts/lib.sh
help_or_go_on "$@"
CUDA_MAJOR=13 # of torch in configs/constraints-gpu.txt
TORCH_INDEX="${SAYO_TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}"
STAGES=5 IMPORTS=5

die() { # code, what, fix
  printf 'SAYO-%s: %s | at scripts/setup_env.sh | fix: %s\n' "$1" "$2" "$3" >&2
  exit 1
}

stage() { # number, what
  printf '[%d/%d] %4d s  %s\n' "$1" "$STAGES" "$SECONDS" "$2"
}

step_failed() { # what, fix
  printf -- '--- the last lines of %s\n' "$LOG" >&2
  tail -n 30 "$LOG" >&2
  die X92 "$1" "$2 Then run the same command again; the whole output is in $LOG"
}

pip_install() {
  "$PY" -m pip install --no-compile "$@" >>"$LOG" 2>&1
}

pinned() { # distribution: its version in the constraints
  sed -n "s/^$1==//p" "$CONSTRAINTS"
}

has_gpu() {
  command -v nvidia-smi >/dev/null && [[ "$(nvidia-smi -L 2>/dev/null)" == GPU* ]]
}

find_python() { # prints the command of a Python 3.11
  local name found
  for name in python3.11 python3 python; do
    # A name on PATH may be a version manager's stub that runs nothing, so it has to answer.
    found="$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
    if [[ "$found" == 3.11 ]]; then
      command -v "$name"
      return
    fi
  done
  die X90 "no Python 3.11 on PATH (tried: python3.11, python3, python)" \
    "install Python 3.11 with venv and pip, or put its folder on PATH"
}

files_hash() { # of everything that decides what is installed
  cat pyproject.toml scripts/setup_env.sh scripts/cpu_stack_fixups.py "$CONSTRAINTS" | sha256sum | cut -d ' ' -f 1
}

stack() { # prints what is installed; fails when something is missing or sayo_verl is another checkout
  "$PY" -I - "$ROOT" <<'PY'
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# find_spec looks without importing: the whole check takes a fraction of a second.
shown = ["torch", "vllm", "verl", "transformers", "ray"]
missing = [m for m in (*shown, "torchvision", "transfer_queue", "tensordict", "pytest") if find_spec(m) is None]
if missing:
    sys.exit(f"missing: {', '.join(missing)}")
own = find_spec("sayo_verl")
if own is None or own.origin is None or not Path(own.origin).is_relative_to(sys.argv[1]):
    sys.exit(f"sayo_verl of this checkout is not installed (found: {own and own.origin})")
# Not a reason to build anew: flash-attn is built last, unless it is left out; playwright, of the tests, is added.
shown += [name for name in ("flash-attn", "playwright") if find_spec(name.replace("-", "_"))]
print(", ".join([f"python {sys.version.split()[0]}"] + [f"{name} {version(name)}" for name in shown]))
PY
}

# An environment that another checkout made, or may have made, is not changed: it may be in use.
check_owner() {
  [[ -f "$OWNED" ]] || return 0
  local root made
  root="$(sed -n 's/^root //p' "$OWNED")"
  [[ "$root" != "$ROOT" ]] || return 0
  made="$(sed -n 's/^layout [a-z]* //p' "$STAMP" 2>/dev/null || true)"
  if [[ -n "$root" || "${made:-$VENV}" != "$VENV" ]]; then
    die X94 "$NAME was made for another checkout (${root:-$made}), which may be using it" "$(another_folder)"
  fi
  # Earlier versions of this script wrote no root: the stamp decides, or the installed sayo_verl.
  [[ -n "$made" ]] && { [[ "${VENV%/*}" == "$ROOT" ]] || stack >/dev/null 2>&1; } ||
    die X95 "it is unknown which checkout $NAME was made for" "$(another_folder)"
}

another_folder() {
  if [[ -L "$VENV" ]]; then
    printf 'remove the link (rm %q) or name another folder in SAYO_VENV' "$VENV"
  else
    printf 'name another folder in SAYO_VENV; if nothing uses this one any more (say the checkout was moved): rm -rf %q' \
      "$VENV"
  fi
}

write_stamp() {
  STACK="$(stack)"
  printf 'layout %s\nfiles %s\nstack %s\n' "$MODE $VENV" "$(files_hash)" "$STACK" >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"
}

# If it is not ready, sets WHY to the reason, and KEEP to yes if the environment can be updated in place.
is_ready() {
  KEEP=no
  check_owner
  if [[ ! -e "$VENV" ]]; then
    WHY="not built yet"
  elif [[ ! -f "$STAMP" ]]; then
    WHY="the last setup did not finish"
  elif [[ "$(sed -n 's/^layout //p' "$STAMP")" != "$MODE $VENV" ]]; then
    WHY="made for '$(sed -n 's/^layout //p' "$STAMP")', not '$MODE $VENV'"
  elif ! STACK="$(stack 2>&1)"; then
    WHY="damaged: ${STACK##*$'\n'}"
  elif [[ "$(sed -n 's/^stack //p' "$STAMP")" != "$STACK" ]]; then
    WHY="packages were changed since: $STACK" KEEP=yes
  elif [[ "$(sed -n 's/^files //p' "$STAMP")" != "$(files_hash)" ]]; then
    WHY="pyproject.toml, the constraints or the setup scripts changed" KEEP=yes
  elif [[ "$MODE" == gpu && "${SAYO_FLASH_ATTN:-1}" != 0 && "$STACK" != *flash-attn* ]]; then
    WHY="flash-attn is missing" KEEP=yes
  else
    return 0
  fi
  return 1
}

make_empty() {
  local python="$1" folder
  if [[ -e "$VENV" && ! -f "$OWNED" && -n "$(ls -A "$VENV")" ]]; then
    die X91 "$VENV exists and was not made by this script" "move it away, or name another folder in SAYO_VENV"
  fi
  mkdir -p "$VENV"
  # The content, not the folder: SAYO_VENV may be a link to a larger disk. The mark is deleted too and written again
  # at once, before any slow step.
  find "$VENV/" -mindepth 1 -delete
  printf 'root %s\n' "$ROOT" >"$OWNED"
  folder="$(cd "$VENV" && pwd -P)" # venv refuses a link
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv "$folder" >>"$LOG" 2>&1 || step_failed "no virtual environment" "See above."
  else # Debian and its derivatives package ensurepip apart, but their pip can install into another environment
    "$python" -m venv --without-pip "$folder" >>"$LOG" 2>&1 || step_failed "no virtual environment" "See above."
    "$python" -m pip --python "$PY" install "pip==$(pinned pip)" >>"$LOG" 2>&1 ||
      step_failed "pip could not be installed into $NAME" "Install the package python3.11-venv of your system."
  fi
}

install_cpu() {
  local torch base
  torch="torch==$(pinned torch)+cpu"
  # Alone and without dependencies, so that a second index can serve these two and nothing else. setuptools comes along
  # because the next step builds without isolation: with the pinned one instead of the newest.
  base=("pip==$(pinned pip)" "setuptools==$(pinned setuptools)" "$torch" "torchvision==$(pinned torchvision)")
  stage 2 "torch and torchvision: $torch (some 10 s plus 200 MB of download)"
  if ! pip_install --no-deps "${base[@]}"; then
    tail -n 20 "$LOG" | grep 'No matching distribution found for torch' >/dev/null ||
      step_failed "torch could not be installed" "Look at the first ERROR line above (network? disk space?)."
    printf '            the package index has no %s: taking it from %s\n' "$torch" "$TORCH_INDEX"
    pip_install --no-deps --extra-index-url "$TORCH_INDEX" "${base[@]}" ||
      step_failed "neither the package index nor $TORCH_INDEX has $torch" \
        "Check the network, or set SAYO_TORCH_INDEX_URL to an index that has it."
  fi
  stage 3 "verl, vLLM, transformers and the rest (about a minute plus 1.3 GB of download)"
  pip_install --no-build-isolation --constraint "$CONSTRAINTS" --editable '.[cpu,dev]' ||
    step_failed "the packages could not be installed" "Look at the first ERROR line above (network? disk space?)."
  stage 4 "fix-ups of the CPU wheels"
  "$PY" scripts/cpu_stack_fixups.py >>"$LOG" 2>&1 || step_failed "a fix-up failed" "See above."
  sed -n '/^torchvision: /,$p' "$LOG" | cut -c 1-150 | sed 's/^/            /'
}

find_nvcc() { # prints the folder of the CUDA toolkit that torch's build tools will take
  local nvcc places=("$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc)
  [[ -z "${CUDA_HOME-}" ]] || places=("$CUDA_HOME/bin/nvcc")
  for nvcc in "${places[@]}"; do
    if [[ -x "$nvcc" ]]; then
      printf '%s\n' "${nvcc%/bin/nvcc}"
      return
    fi
  done
}

# Before gigabytes are downloaded: flash-attn is installed last, and is the only package that is compiled.
check_nvcc() {
  [[ "${SAYO_FLASH_ATTN:-1}" == 1 ]] || return 0
  local found=""
  CUDA_HOME="$(find_nvcc)"
  [[ -z "$CUDA_HOME" ]] || found="$("$CUDA_HOME/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')"
  if [[ "${found%%.*}" != "$CUDA_MAJOR" ]]; then
    die X96 "flash-attn cannot be built here without nvcc of CUDA $CUDA_MAJOR (found: ${found:-none})" \
      "install the CUDA $CUDA_MAJOR toolkit and set CUDA_HOME (the build takes minutes on 64 cores, 9 GB of memory for each of \
MAX_JOBS), or give a wheel in SAYO_FLASH_ATTN, or set SAYO_FLASH_ATTN=0: then Qwen2.5-VL does not train packed, and \
Qwen3-VL and InternVL do with sdpa, where a log-prob pass takes about 3 times as long (by arithmetic)"
  fi
  export CUDA_HOME
}

install_gpu() {
  stage 2 "verl's own GPU stack (several minutes, some 10 GB)"
  # First what the next step builds with, since it builds without isolation.
  pip_install --no-deps "pip==$(pinned pip)" "setuptools==$(pinned setuptools)" ||
    step_failed "setuptools could not be installed" "Look at the first ERROR line above (network? disk space?)."
  pip_install --no-build-isolation --constraint "$CONSTRAINTS" --editable '.[gpu,dev]' ||
    step_failed "the packages could not be installed" "Look at the first ERROR line above (network? disk space?)."
}

has_flash_attn() { # what verl imports of it
  "$PY" -I -c 'import flash_attn.bert_padding, flash_attn.ops.triton.cross_entropy' >>"$LOG" 2>&1
}

install_flash_attn() {
  if [[ "${SAYO_FLASH_ATTN:-1}" == 0 ]]; then
    stage "$STAGES" "without flash-attn (SAYO_FLASH_ATTN=0): the plan of a run names the cost"
    return
  fi
  local wanted="${SAYO_FLASH_ATTN:-1}"
  [[ "$wanted" != 1 ]] || wanted="flash-attn==$(pinned flash-attn)"
  stage "$STAGES" "$wanted (built for torch; minutes on 64 cores, an hour or more on few)"
  # Its setup would take a wheel for CUDA 12 from the web, if there is one, whatever torch was built for.
  has_flash_attn ||
    FLASH_ATTENTION_FORCE_BUILD=TRUE pip_install --no-build-isolation --constraint "$CONSTRAINTS" "$wanted" ||
    step_failed "flash-attn could not be built" "Out of memory? Try MAX_JOBS=4, and FLASH_ATTN_CUDA_ARCHS=90 for H100."
  has_flash_attn || step_failed "flash-attn is installed but does not import" \
    "It was built for another torch: $PY -m pip uninstall -y flash-attn."
}

WHERE=no MODE=
for argument; do
  case "$MODE/$argument" in
    */--where) WHERE=yes ;;
    /cpu | /gpu) MODE="$argument" ;;
    *) die X93 "unknown argument '$argument'" "give cpu or gpu, once, and --where to print the folder only" ;;
  esac
done
if [[ -z "$MODE" ]]; then
  if has_gpu; then MODE=gpu; else MODE=cpu; fi
fi
if [[ "$MODE" == cpu ]]; then VENV="${SAYO_VENV:-.venv}"; else VENV="${SAYO_VENV:-.venv-gpu}"; fi
[[ "$VENV" == /* ]] || VENV="$ROOT/$VENV"
CONSTRAINTS="configs/constraints-$MODE.txt"
if [[ "$WHERE" == yes ]]; then printf '%s\n' "$VENV" && exit 0; fi
NAME="${VENV#"$ROOT"/}"
PY="$VENV/bin/python"
STAMP="$VENV/.sayo-stamp" # written last: without it an environment is unfinished
OWNED="$VENV/.sayo-env"   # written first, names this checkout: a folder without it is not ours to empty
LOG="$VENV/setup.log"

if is_ready; then
  printf 'environment: reused %s (%s)\n' "$NAME" "$STACK"
  exit 0
fi

# One setup at a time. A setup that had to wait finds the environment ready.
mkdir -p "$(dirname "$VENV")"
if command -v flock >/dev/null; then
  exec 9>"$VENV.lock"
  if ! flock --nonblock 9; then
    printf 'environment: another setup is building %s, waiting for it\n' "$NAME"
    flock 9
  fi
  if is_ready; then
    printf 'environment: reused %s (%s)\n' "$NAME" "$STACK"
    exit 0
  fi
else
  printf 'environment: no flock on this machine, so two setups are not kept apart\n'
fi

if [[ "$MODE" == gpu ]]; then
  STAGES=4 IMPORTS=3
  # A flash-attn that imports is kept (install_flash_attn), so nothing is compiled.
  [[ "$KEEP" == yes ]] && has_flash_attn || check_nvcc
fi
if [[ "$KEEP" == yes ]]; then
  stage 1 "bringing $NAME up to date ($WHY)"
  printf 'root %s\n' "$ROOT" >"$OWNED"
  rm -f "$STAMP" # an interrupted update must not count as finished
  : >"$LOG"
else
  PYTHON="$(find_python)"
  stage 1 "building $NAME for $MODE with $PYTHON ($WHY)"
  make_empty "$PYTHON"
fi
"install_$MODE"
stage "$IMPORTS" "trying all imports"
"$PY" -I - >>"$LOG" 2>&1 <<'PY' || step_failed "the packages are installed but do not import" "The error above names the package; $NAME is built anew next time."
import ray, tensordict, torch, torchvision, transfer_queue, transformers, verl, vllm
from transformers import Qwen2VLImageProcessor, Qwen3VLForConditionalGeneration

import sayo_verl
PY
write_stamp
if [[ "$MODE" == gpu ]]; then # an environment without it is finished, and the next try updates it
  install_flash_attn
  write_stamp
fi
printf 'environment: built %s in %d s, %s (%s)\nto enter it: source %s/bin/activate\n' \
  "$NAME" "$SECONDS" "$(du -sh "$VENV" | cut -f 1)" "$STACK" "$NAME"
