#!/usr/bin/env bash
# SAYO (attn_region) | Qwen3-VL-4B, LoRA | vLLM rollouts | FSDP2 | GPUs
#
# The job of run_sayo_qwen3vl_8b.sh on the paper's smaller model. Its values and
# their sources: configs/job/sayo_qwen3vl_4b.yaml. Composed and checked; not run
# on GPUs.
#
#   DATA=data/sayo bash scripts/run_sayo_qwen3vl_4b.sh
#   DRY_RUN=1 bash scripts/run_sayo_qwen3vl_4b.sh
#       compose, check, print the plan; no GPU
#   METHOD=grpo bash scripts/run_sayo_qwen3vl_4b.sh            the paired baseline
set -euo pipefail
JOB=sayo_qwen3vl_4b OWN_METHOD=region source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
