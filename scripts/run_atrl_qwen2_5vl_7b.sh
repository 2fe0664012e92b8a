#!/usr/bin/env bash
# Our reading of AT-RL (attn_anchor) on GRPO | Qwen2.5-VL-7B | vLLM rollouts | FSDP2 | GPUs
#
# The paired baseline is scripts/run_grpo_qwen2_5vl_7b.sh.
# Options: scripts/run_qwen2_5vl_7b.sh
set -euo pipefail
export METHOD=anchor NAME=${NAME:-atrl_qwen2_5vl_7b}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_qwen2_5vl_7b.sh" "$@"
