#!/usr/bin/env bash
# Starts a job of configs/job with a method of configs/method. Variables mean the
# same in every script that calls this one. A Hydra override at the end wins:
#
#   METHOD=NAME        region, dual, dual_released, anchor, faithful, sensitivity,
#                      evidence, region_dual, grpo, dapo, or your own file of
#                      configs/method
#   MODEL_PATH=MODEL   folder or hub name             actor_rollout_ref.model.path
#   DATA=FOLDER        of `sayo prepare`              sayo.data, or train_files
#                                                     and val_files of data
#   OUT=FOLDER         of a new run                   sayo.out
#                      (default outputs/<name>/<time>)
#   RESUME=FOLDER      of a run (docs/resume.md)      sayo.resume
#   NNODES=N           with RAY_ADDRESS=... of the cluster      trainer.nnodes
#   NGPUS_PER_NODE=N                                  trainer.n_gpus_per_node
#   DRY_RUN=1          compose, check, print the plan; no GPU, no file
#
# A relative path starts at the folder of the clone. All else is an override, such
# as actor_rollout_ref.actor.optim.lr=1e-6
#
#   JOB=qwen2_5vl_7b METHOD=anchor bash scripts/run.sh
#       JOB is needed here; run_<paper>_<model>.sh sets it
#
# An active Python that has sayo-verl is used unchanged (in a verl container,
# say). Otherwise an environment is built.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
source scripts/lib.sh
help_or_go_on "$@"
[[ -n "${JOB:-}" ]] || refuse L30 "no job is named" JOB "call a script run_<paper>_<model>.sh, or set JOB=NAME: $(cd configs/job && echo *.yaml)"
dry_run && DRY=1 || DRY=0
place_run "$@"
check_names "$@"

ready_python sayo_verl verl
export VERL_USE_EXTERNAL_MODULES=${VERL_USE_EXTERNAL_MODULES:+$VERL_USE_EXTERNAL_MODULES,}sayo_verl.plugin

GIVEN=(trainer.experiment_name="$NAME")
[[ -z "${MODEL_PATH:-}" ]] || GIVEN+=(actor_rollout_ref.model.path="$(quoted "$MODEL_PATH")")
[[ -z "${DATA:-}" ]] || GIVEN+=(sayo.data="$(quoted "$DATA")")
[[ -z "${NNODES:-}" ]] || GIVEN+=(trainer.nnodes="$NNODES")
[[ -z "${NGPUS_PER_NODE:-}" ]] || GIVEN+=(trainer.n_gpus_per_node="$NGPUS_PER_NODE")
if [[ -n "${RESUME:-}" ]]; then GIVEN+=(sayo.resume="$(quoted "$OUT")"); else GIVEN+=(sayo.out="$(quoted "$OUT")"); fi
if ((DRY)); then
  export VERL_PLATFORM=${VERL_PLATFORM:-cpu} VERL_LOGGING_LEVEL=${VERL_LOGGING_LEVEL:-WARNING}
  GIVEN+=(sayo.dry_run=True hydra/job_logging=none)
fi
exec python3 -m sayo_verl.main_ppo --config-dir configs +job="$JOB" +method="$METHOD" "${GIVEN[@]}" "$@"
