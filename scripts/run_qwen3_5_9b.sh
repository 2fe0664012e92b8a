#!/usr/bin/env bash
# Any method, SAYO if none is named | Qwen3.5-9B, LoRA | vLLM rollouts | FSDP2 |
# GPUs
#
# SAYO's job on Qwen3.5, with values of Evidence-RL (arXiv 2608.08021), which
# trains this model: configs/job/qwen3_5_9b.yaml. Packed rows need
# flash-linear-attention: pip install flash-linear-attention==0.6.0
# Layers 3, 7, ..., 31 have full attention and can be measured; the default is the
# last. Composed and checked; not run on GPUs.
#
#   DATA=data/sayo bash scripts/run_qwen3_5_9b.sh
#   DRY_RUN=1 bash scripts/run_qwen3_5_9b.sh
#       compose, check, print the plan; no GPU
#   METHOD=dual bash scripts/run_qwen3_5_9b.sh                   VGPO
#   METHOD=evidence bash scripts/run_qwen3_5_9b.sh
#       Evidence-RL = scripts/run_evidence_qwen3_5_9b.sh
#   METHOD=grpo bash scripts/run_qwen3_5_9b.sh  the paired baseline
set -euo pipefail
METHOD=${METHOD:-region} JOB=qwen3_5_9b OWN_METHOD='' source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
