#!/usr/bin/env bash
# SAYO (attn_region) | Qwen3-VL-4B, LoRA | vLLM rollouts | FSDP2 | one 80 GB GPU
#
# The job of run_sayo_qwen3vl_8b.sh on the paper's smaller model [P] and one card
# [ours]: configs/job/sayo_qwen3vl_4b_1gpu.yaml. A step has the paper's 24 prompts
# x 16 responses [C] and takes some eight times as long as on eight cards.
# Composed and checked; not run on a GPU.
#
#   DATA=data/sayo bash scripts/run_sayo_qwen3vl_4b_1gpu.sh
#   DRY_RUN=1 bash scripts/run_sayo_qwen3vl_4b_1gpu.sh
#       compose, check, print the plan; no GPU
#   RESUME=outputs/sayo_qwen3vl_4b_1gpu/<time> bash \
#       scripts/run_sayo_qwen3vl_4b_1gpu.sh
#       resume a run
#   METHOD=grpo bash scripts/run_sayo_qwen3vl_4b_1gpu.sh  the paired baseline
#
# GiB by arithmetic, of 79.0 (the plan prints them too; the terms are listed in
# sayo_verl/launch/memory.py):
#   log-probs 27.7       weights 16.7 (float32), logits 4.6, vLLM asleep 2.0, ...
#   update 29.3          weights 16.7, kept activations 2.8, vLLM asleep 2.0, ...
#   optimizer step 20.6  weights 16.7, vLLM asleep 2.0, CUDA 1.5, Adam 0.2, ...
#   weight sync 30.7     weights 16.7, vLLM weights 8.3, bucket 2.0, ...
#   rollout 67.8         KV cache 37.8, weights 16.7, vLLM weights 8.3, ...
# The KV cache holds 42 sequences of 6,610 tokens.
# A card of 48 GB holds it with
# actor_rollout_ref.rollout.gpu_memory_utilization=0.4.
set -euo pipefail
JOB=sayo_qwen3vl_4b_1gpu OWN_METHOD=region source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
