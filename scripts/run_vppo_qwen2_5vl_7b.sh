#!/usr/bin/env bash
# VPPO (attn_sensitivity) on DAPO | Qwen2.5-VL-7B | vLLM rollouts | FSDP2 | GPUs
#
# The paired baseline is scripts/run_dapo_qwen2_5vl_7b.sh. The paper's batch is
# data.train_batch_size=384. Values and sources: configs/job/qwen2_5vl_7b.yaml.
set -euo pipefail
JOB=qwen2_5vl_7b OWN_METHOD=sensitivity source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
