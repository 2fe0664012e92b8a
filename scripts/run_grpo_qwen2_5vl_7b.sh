#!/usr/bin/env bash
# GRPO, verl's own code | Qwen2.5-VL-7B | vLLM rollouts | FSDP2 | GPUs
#
# The paired baseline of run_atrl_ and run_faithful_qwen2_5vl_7b.sh: the same job but for the method.
# Options: scripts/run_qwen2_5vl_7b.sh
set -euo pipefail
export METHOD=grpo NAME=${NAME:-grpo_qwen2_5vl_7b}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_qwen2_5vl_7b.sh" "$@"
