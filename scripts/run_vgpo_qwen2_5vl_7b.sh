#!/usr/bin/env bash
# VGPO (attn_dual) on DAPO | Qwen2.5-VL-7B | vLLM rollouts | FSDP2 | GPUs
#
# The paired baseline is scripts/run_dapo_qwen2_5vl_7b.sh. With the released code's arithmetic: METHOD=dual_released
# Options: scripts/run_qwen2_5vl_7b.sh
set -euo pipefail
export METHOD=${METHOD:-dual} NAME=${NAME:-vgpo_qwen2_5vl_7b}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_qwen2_5vl_7b.sh" "$@"
