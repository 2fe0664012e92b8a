#!/usr/bin/env bash
# GRPO, verl's own code | Qwen3-VL-8B, LoRA | vLLM rollouts | FSDP2 | GPUs
#
# The paired baseline of run_sayo_qwen3vl_8b.sh: the same job but for the method.
# Without r_v the reward would not depend on the answer, so accuracy is rewarded.
# Values and sources: configs/job/sayo_qwen3vl_8b.yaml.
set -euo pipefail
JOB=sayo_qwen3vl_8b OWN_METHOD=grpo source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
