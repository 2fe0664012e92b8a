#!/usr/bin/env bash
# Our reading of AT-RL (attn_anchor) on GRPO | Qwen2.5-VL-7B | vLLM rollouts |
# FSDP2 | GPUs
#
# The paired baseline is scripts/run_grpo_qwen2_5vl_7b.sh.
# Values and sources: configs/job/qwen2_5vl_7b.yaml.
set -euo pipefail
JOB=qwen2_5vl_7b OWN_METHOD=anchor source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
