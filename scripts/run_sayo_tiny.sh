#!/usr/bin/env bash
# SAYO (attn_region) | tiny Qwen3-VL on drawn scenes | CPU | options and the other methods: scripts/run_tiny.sh
#
# The paired baseline is scripts/run_grpo_tiny.sh.
set -euo pipefail
export METHOD=region NAME=${NAME:-sayo_tiny}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_tiny.sh" "$@"
