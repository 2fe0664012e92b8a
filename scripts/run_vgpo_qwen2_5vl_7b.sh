#!/usr/bin/env bash
# VGPO (attn_dual) on DAPO | Qwen2.5-VL-7B | vLLM rollouts | FSDP2 | GPUs
#
# The paired baseline is scripts/run_dapo_qwen2_5vl_7b.sh. With the released
# code's arithmetic: METHOD=dual_released. Values and sources:
# configs/job/qwen2_5vl_7b.yaml.
set -euo pipefail
JOB=qwen2_5vl_7b OWN_METHOD=dual source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
