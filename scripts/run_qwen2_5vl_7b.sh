#!/usr/bin/env bash
# Any method, VGPO if none is named | Qwen2.5-VL-7B | vLLM rollouts | FSDP2 | GPUs
#
# The job of "Visually-Guided Policy Optimization" (VGPO, arXiv 2604.09349), on
# which the other methods run too. Its values and their sources:
# configs/job/qwen2_5vl_7b.yaml.
#
#   METHOD=dual bash scripts/run_qwen2_5vl_7b.sh
#       VGPO on DAPO = scripts/run_vgpo_qwen2_5vl_7b.sh
#   METHOD=sensitivity bash scripts/run_qwen2_5vl_7b.sh
#       VPPO on DAPO = scripts/run_vppo_qwen2_5vl_7b.sh
#   METHOD=dapo bash scripts/run_qwen2_5vl_7b.sh
#       their baseline = scripts/run_dapo_qwen2_5vl_7b.sh
#   METHOD=anchor bash scripts/run_qwen2_5vl_7b.sh
#       reading of AT-RL = scripts/run_atrl_qwen2_5vl_7b.sh
#   METHOD=faithful bash scripts/run_qwen2_5vl_7b.sh
#       r. of Faithful-MR1 = scripts/run_faithful_qwen2_5vl_7b.sh
#   METHOD=grpo bash scripts/run_qwen2_5vl_7b.sh
#       their baseline = scripts/run_grpo_qwen2_5vl_7b.sh
#   DRY_RUN=1 METHOD=dual bash scripts/run_qwen2_5vl_7b.sh
#       compose, check, print the plan; no GPU
#
# METHOD=region, region_dual, evidence, and faithful with causal_unit=region need
# boxes in some rows; the others need none. Without boxes:
# `sayo prepare jsonl --keep-without-boxes`, with "boxes": [] in each line. The
# job names two files; give a folder of `sayo prepare` (DATA=data/gqa) or
# data.train_files=... data.val_files=... instead.
set -euo pipefail
METHOD=${METHOD:-dual} JOB=qwen2_5vl_7b OWN_METHOD='' source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
