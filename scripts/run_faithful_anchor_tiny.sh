#!/usr/bin/env bash
# attn_faithful, anchoring stage (our reading of Faithful-MR1) | tiny Qwen3-VL on drawn scenes | CPU, one core
#
# Adds <Focus> to the warmed-up tiny policy, trains its attention to look at the target's box, prints held-out figures
# before and after, draws where it looks and says where the folder for the reinforcement stage lies. No Ray, no vLLM;
# about a minute on one core.
#
#   bash scripts/run_faithful_anchor_tiny.sh
#   STEPS=300 bash scripts/run_faithful_anchor_tiny.sh --layers 0 1          any flag of `train` goes at the end
#
# The folder then is the policy of a run: the last line is the command of the reinforcement stage.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
source scripts/lib.sh
help_or_go_on "$@"

# ---------------------------------------------------------------------------------------------------------------------
NAME=${NAME:-faithful_anchor_tiny}
OUT=${OUT:-outputs/$NAME/$(date +%Y%m%d-%H%M%S)}
CACHE=${CACHE:-.sayo}                           # scenes and policies, each in a folder named after its settings
REGION=${REGION:-target}                        # whose box <Focus> learns; "distractor" is the wrong-box control
POLICY=${POLICY:-}                              # a policy folder; empty: the warmed-up tiny policy

STEPS=${STEPS:-150}
BATCH_SIZE=${BATCH_SIZE:-32}                    # rows
LR=${LR:-1e-3}
WEIGHT=${WEIGHT:-1.0}                           # lambda of L_anchor
ALPHA=${ALPHA:-0.1}                             # background share of the target
RESPONSE_ROWS=${RESPONSE_ROWS:-1024}            # rows whose right answers are sampled and imitated; 0: empty thoughts
# ---------------------------------------------------------------------------------------------------------------------

if [[ -e "$OUT/policy" ]]; then
  echo "SAYO-F16: the folder has files | at $OUT/policy | fix: choose a new output folder (OUT=...)" >&2
  exit 2
fi

bash scripts/setup_env.sh cpu
VENV="$(bash scripts/setup_env.sh --where cpu)"
export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

SCENES=$(sayo prepare synthetic --out "$CACHE" --region "$REGION")
[[ -n "$POLICY" ]] || POLICY=$(sayo prepare policy --out "$CACHE")
mkdir -p "$OUT"

ROWS="$SCENES/train.parquet"
if [[ "$RESPONSE_ROWS" != 0 ]]; then
  ROWS=$(sayo focus respond --base "$POLICY" --rows "$SCENES/train.parquet" \
    --out "$OUT/rows.parquet" --max-rows "$RESPONSE_ROWS" --max-new-tokens 24 --batch-size 128)
fi

sayo focus train --base "$POLICY" --rows "$ROWS" --out "$OUT/policy" \
  --steps "$STEPS" --batch-size "$BATCH_SIZE" --learning-rate "$LR" --weight "$WEIGHT" --alpha "$ALPHA" "$@"

sayo focus report --base "$POLICY" --after "$OUT/policy" --rows "$SCENES/val.parquet" \
  --out "$OUT" --alpha "$ALPHA" --answers
echo "policy   $OUT/policy"
echo "next     METHOD=faithful MODEL_PATH=$(printf '%q' "$(realpath "$OUT/policy")") bash scripts/run_tiny.sh"
