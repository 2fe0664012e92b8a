#!/usr/bin/env bash
# GRPO, verl's own code | Qwen3-VL-8B | vLLM rollouts | FSDP | the paired baseline of run_sayo_qwen3vl_8b.sh
#
# The same job but for the method: without r_v something must say which answer was right, so accuracy is rewarded.
set -euo pipefail
export ADV_ESTIMATOR=grpo NAME=${NAME:-grpo_qwen3vl_8b} ACCURACY_WEIGHT=${ACCURACY_WEIGHT:-1.0}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_sayo_qwen3vl_8b.sh" "$@"
