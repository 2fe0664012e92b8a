#!/usr/bin/env bash
# GRPO, verl's own code | tiny Qwen3-VL on drawn scenes | CPU | the paired
# baseline of run_sayo_tiny.sh
#
# The same job but for the method: no attention is measured, so the report has no
# rows for it. (To see them without rewarding them: bash scripts/run_sayo_tiny.sh
# algorithm.attn.region.weight=0, which trains as GRPO does.)
set -euo pipefail
OWN_METHOD=grpo source "$(dirname "${BASH_SOURCE[0]}")/run_tiny.sh"
