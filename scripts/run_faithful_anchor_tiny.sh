#!/usr/bin/env bash
# attn_faithful, anchoring stage (our reading of Faithful-MR1) | tiny Qwen3-VL on
# drawn scenes | CPU, one core
#
# Adds <Focus> to the warmed-up tiny policy, trains its attention to look at the
# target's box, prints held-out figures before and after, and draws where it
# looks. No Ray, no vLLM; about a minute on one core. The last line is the command
# of the reinforcement stage. Its values: configs/focus/tiny.yaml. Variables:
# scripts/anchor.sh --help.
#
#   bash scripts/run_faithful_anchor_tiny.sh
#   bash scripts/run_faithful_anchor_tiny.sh train.steps=300 train.layers=[0,1]
#   bash scripts/run_faithful_anchor_tiny.sh train.weight=0
#       imitation without anchoring
#   DATA=$(sayo prepare synthetic --region distractor) bash \
#       scripts/run_faithful_anchor_tiny.sh
#       the wrong-box control
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
source scripts/lib.sh
help_or_go_on "$@"
export JOB=tiny
OWN_METHOD=faithful
place_run "$@"
if dry_run; then exec bash scripts/anchor.sh "$@"; fi

enter_environment cpu
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

python -m sayo_verl.focus run --check configs/focus/tiny.yaml "$@" # before the policy takes its minutes
[[ -n "${DATA:-}" || " $*" == *" train_files="* ]] || DATA=$(sayo prepare synthetic --out .sayo)
[[ -n "${MODEL_PATH:-}" ]] || MODEL_PATH=$(sayo prepare policy --out .sayo)
export DATA MODEL_PATH
exec bash scripts/anchor.sh "$@"
