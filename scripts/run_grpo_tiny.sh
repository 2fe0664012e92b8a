#!/usr/bin/env bash
# GRPO, verl's own code | tiny Qwen3-VL on drawn scenes | CPU | the paired baseline of run_sayo_tiny.sh
#
# The same job but for the method: no attention is measured, so the report has no rows for it.
# (To see them without rewarding them: REGION_WEIGHT=0 bash scripts/run_sayo_tiny.sh, which trains as GRPO does.)
set -euo pipefail
export METHOD=grpo NAME=${NAME:-grpo_tiny}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_tiny.sh" "$@"
