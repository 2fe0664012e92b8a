#!/usr/bin/env bash
# Starts a job of configs/focus: the anchoring stage of attn_faithful (our reading
# of Faithful-MR1). A setting KEY=VALUE at the end wins over the job's file. Keys:
# those of the file, and the flags of `sayo focus respond|train|report`.
#
#   MODEL_PATH=MODEL    a folder or a name of the hub        base
#   DATA=FOLDER         a folder of `sayo prepare`           data, or train_files
#                                                            and val_file
#   OUT=FOLDER          of a new job                         out
#                       (default outputs/<name>/<time>)
#   RESUME=FOLDER       of an interrupted job                resume
#   NGPUS_PER_NODE=N    GPUs of this machine                 gpus
#   DRY_RUN=1           check, print the plan; needs no GPU and writes no file
#
# METHOD is faithful, and NNODES is 1. A relative path starts at the folder of the
# clone.
#
#   JOB=qwen2_5vl_7b bash scripts/anchor.sh train.steps=300 train.layers=[14,18]
#       JOB is needed here; run_faithful_anchor_<model>.sh sets it
#
# An active Python that has sayo-verl and peft is used as it is. Otherwise an
# environment is made.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
source scripts/lib.sh
help_or_go_on "$@"
[[ -n "${JOB:-}" ]] || refuse L30 "no job is named" JOB "call a script run_faithful_anchor_<model>.sh, or set JOB=NAME: $(cd configs/focus && echo *.yaml)"
OWN_METHOD=faithful
place_run "$@"
ready_python sayo_verl peft accelerate

GIVEN=()
[[ -z "${MODEL_PATH:-}" ]] || GIVEN+=(base="$MODEL_PATH")
[[ -z "${DATA:-}" ]] || GIVEN+=(data="$DATA")
[[ -z "${NGPUS_PER_NODE:-}" ]] || GIVEN+=(gpus="$NGPUS_PER_NODE")
if [[ -n "${RESUME:-}" ]]; then GIVEN+=(resume="$OUT"); else GIVEN+=(out="$OUT"); fi
DRY=()
! dry_run || DRY=(--dry-run)
exec python3 -m sayo_verl.focus run "${DRY[@]}" "configs/focus/$JOB.yaml" "${GIVEN[@]}" "$@"
