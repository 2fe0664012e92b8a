#!/usr/bin/env bash
# SAYO (attn_region) | InternVL3.5-8B (HF format), LoRA | vLLM rollouts | FSDP2 |
# GPUs
#
# The job of run_sayo_qwen3vl_8b.sh on the paper's third model. Its values and
# their sources: configs/job/sayo_internvl3_5_8b.yaml. Composed and checked; not
# run on GPUs.
#
#   DATA=data/sayo bash scripts/run_sayo_internvl3_5_8b.sh
#   DRY_RUN=1 bash scripts/run_sayo_internvl3_5_8b.sh
#       compose, check, print the plan; no GPU
#   METHOD=grpo bash scripts/run_sayo_internvl3_5_8b.sh  the paired baseline
set -euo pipefail
JOB=sayo_internvl3_5_8b OWN_METHOD=region source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
