#!/usr/bin/env bash
# SAYO (attn_region) | Qwen3-VL-8B, LoRA | vLLM rollouts | FSDP2 | GPUs
#
# The job of "Do MLLMs Really See It" (arXiv 2602.08241) on verl's own launcher.
# Its values and their sources: configs/job/sayo_qwen3vl_8b.yaml.
#
#   DATA=data/sayo bash scripts/run_sayo_qwen3vl_8b.sh  one node, 8 GPUs
#   DRY_RUN=1 bash scripts/run_sayo_qwen3vl_8b.sh
#       compose, check, print the plan; no GPU
#   RAY_ADDRESS=auto NNODES=2 bash scripts/run_sayo_qwen3vl_8b.sh
#       on a node of a Ray cluster that is up
#   METHOD=dual bash scripts/run_sayo_qwen3vl_8b.sh  VGPO in this job
#   bash scripts/run_sayo_qwen3vl_8b.sh algorithm.adv_estimator=rloo
#       any Hydra override goes at the end
#
# The paired baseline is scripts/run_grpo_qwen3vl_8b.sh.
# scripts/run_sayo_qwen3vl_4b_1gpu.sh is the job for one card.
set -euo pipefail
JOB=sayo_qwen3vl_8b OWN_METHOD=region source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
