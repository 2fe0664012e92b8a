#!/usr/bin/env bash
# Our reading of Faithful-MR1 (attn_faithful), reinforcing stage, on GRPO | Qwen2.5-VL-7B | vLLM rollouts | FSDP2 | GPUs
#
# The paired baseline is scripts/run_grpo_qwen2_5vl_7b.sh. MODEL_PATH=<the folder of run_faithful_anchor_qwen2_5vl_7b.sh>;
# without it this stage runs alone, on a model without <Focus>, and the plan says so.
# Options: scripts/run_qwen2_5vl_7b.sh
set -euo pipefail
export METHOD=faithful NAME=${NAME:-faithful_qwen2_5vl_7b}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_qwen2_5vl_7b.sh" "$@"
