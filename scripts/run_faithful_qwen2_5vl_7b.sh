#!/usr/bin/env bash
# Our reading of Faithful-MR1 (attn_faithful), reinforcing stage, on GRPO |
# Qwen2.5-VL-7B | vLLM rollouts | FSDP2 | GPUs
#
# The paired baseline is scripts/run_grpo_qwen2_5vl_7b.sh. MODEL_PATH=<the folder
# of run_faithful_anchor_qwen2_5vl_7b.sh>; without it this stage runs alone, on a
# model without <Focus>, which the plan reports. Values and sources:
# configs/job/qwen2_5vl_7b.yaml.
set -euo pipefail
JOB=qwen2_5vl_7b OWN_METHOD=faithful source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
