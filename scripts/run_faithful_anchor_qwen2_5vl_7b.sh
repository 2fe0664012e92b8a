#!/usr/bin/env bash
# attn_faithful, anchoring stage (our reading of Faithful-MR1) | Qwen2.5-VL-7B |
# transformers Trainer | GPUs
#
# Values and sources: configs/focus/qwen2_5vl_7b.yaml. Composed and checked; not
# run on a GPU.
#
#   DATA=data/gqa bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh
#   DATA=data/gqa DRY_RUN=1 bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh
#       the plan, with the time that sampling takes
#   DATA=data/gqa RESUME=<its folder> bash \
#       scripts/run_faithful_anchor_qwen2_5vl_7b.sh
#       after an interruption
#   DATA=data/gqa bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh \
#       train.lora_rank=0
#       all weights, sharded (FSDP2)
#
# DATA is needed: a folder of `sayo prepare`, here of GQA. Rows need boxes in
# `extra_info.boxes` (docs/data.md). Files in which no row has one are refused
# (SAYO-F22). The last line is the command of the reinforcement stage, with the
# new folder as MODEL_PATH.
set -euo pipefail
JOB=qwen2_5vl_7b source "$(dirname "${BASH_SOURCE[0]}")/anchor.sh"
