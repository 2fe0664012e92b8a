#!/usr/bin/env bash
# DAPO, verl's own code | Qwen2.5-VL-7B | vLLM rollouts | FSDP2 | GPUs
#
# The paired baseline of run_vgpo_ and run_vppo_qwen2_5vl_7b.sh: the same job but
# for the method. Values and sources: configs/job/qwen2_5vl_7b.yaml.
set -euo pipefail
JOB=qwen2_5vl_7b OWN_METHOD=dapo source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
