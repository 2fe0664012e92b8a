#!/usr/bin/env bash
# Evidence-RL (attn_evidence), on GRPO | Qwen3.5-9B, LoRA | vLLM rollouts |
# FSDP2 | GPUs
#
# The paired baseline is METHOD=grpo bash scripts/run_qwen3_5_9b.sh. Rows need
# boxes. Every update takes four further log-prob passes. Values and sources:
# configs/job/qwen3_5_9b.yaml. Composed and checked; not run on GPUs.
set -euo pipefail
JOB=qwen3_5_9b OWN_METHOD=evidence source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
