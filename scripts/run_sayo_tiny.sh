#!/usr/bin/env bash
# SAYO (attn_region) | tiny Qwen3-VL on drawn scenes | CPU
#
# The paired baseline is scripts/run_grpo_tiny.sh. Options and the other methods:
# scripts/run_tiny.sh
set -euo pipefail
OWN_METHOD=region source "$(dirname "${BASH_SOURCE[0]}")/run_tiny.sh"
