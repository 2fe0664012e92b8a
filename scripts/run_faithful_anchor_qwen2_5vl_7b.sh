#!/usr/bin/env bash
# attn_faithful, anchoring stage (our reading of Faithful-MR1) | Qwen2.5-VL-7B | transformers Trainer | GPUs
#
# The abstract of "Faithful Multimodal Reasoning via Anchoring and Reinforcing Visual Attention" (arXiv 2605.22072) names
# the models, Qwen2.5-VL-Instruct 3B and 7B, and a <Focus> token whose attention is supervised against image regions. No
# number below is theirs. Sources: [E] EASE, arXiv 2605.30912; [L] LLaMA-Factory's examples for this model,
# train_lora/qwen2_5vl_lora_sft.yaml and train_full/qwen2_5vl_full_sft.yaml; [ours] with a reason. This script was composed
# and its plan printed; it was not run on a GPU.
#
#   DATA=data/gqa bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh           a folder of `sayo prepare`
#   TRAIN_FILE=... VAL_FILE=... bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh
#   DRY_RUN=1 bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh               print the plan; no GPU
#   OUT=<its folder> bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh        go on sampling after an interruption
#   LORA_RANK=0 bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh             all weights of the decoder, sharded (FSDP2)
#   bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh --layers 14 18          any flag of `train` goes at the end
#
# Rows need boxes in `extra_info.boxes` (docs/data.md), as `sayo prepare` writes them; files in which no row has one are
# refused (SAYO-F22). The default files are those of the reinforcement stage, which nothing here makes. The last line is
# the command of the reinforcement stage, with the new folder as MODEL_PATH. The plan says how long sampling takes.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
source scripts/lib.sh
help_or_go_on "$@"

# ---------------------------------------------------------------------------------------------------------------------
NAME=${NAME:-faithful_anchor_qwen2_5vl_7b}
DRY_RUN=${DRY_RUN:-0}
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-VL-7B-Instruct}
DATA=${DATA:-}                     # a folder of `sayo prepare`, instead of the two files
TRAIN_FILE=${TRAIN_FILE:-data/virl39k/train.parquet}    # as in run_qwen2_5vl_7b.sh, with boxes added
VAL_FILE=${VAL_FILE:-data/mmk12/val.parquet}
OUT=${OUT:-outputs/$NAME/$(date +%Y%m%d-%H%M%S)}
NGPUS=${NGPUS:-${NGPUS_PER_NODE:-8}}                    # of one machine; the other scripts' name is taken, too

RESPOND=${RESPOND:-1}              # 1: sample right answers to imitate; 0: the training rows have a column `response`
ROWS=${ROWS:-8192}                 # [ours] sampled rows, the first ones: half an hour on 8 GPUs; or all
TRIES=${TRIES:-4}                  # [ours] samples a row: at 50 % right answers a fifth would find 3 % more
SAMPLE_BATCH_SIZE=${SAMPLE_BATCH_SIZE:-32}              # [ours] 32 x 5,120 tokens are 9 GiB of KV cache
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-1024}        # [ours] half of the reinforcement stage's: time grows with it

WEIGHT=${WEIGHT:-1.0}              # [ours] lambda of L_anchor: it starts at 1.7 nats on the tiny task, the order of L_LM
ALPHA=${ALPHA:-0.1}                # [E] background share of the target
STEPS=${STEPS:-500}                # [ours] of 64 rows: four passes over 8,192; [L] has three
BATCH_SIZE=${BATCH_SIZE:-2}        # [ours] rows per GPU and forward: 9.3 GiB of float32 logits if both are 8,192 tokens
ACCUMULATION=${ACCUMULATION:-}     # empty: [ours] 64 rows a step, or as near as NGPUS x BATCH_SIZE comes; [L] 8 a GPU
LORA_RANK=${LORA_RANK:-64}         # [ours] 8 in [L]: a token's attention is new, not a style; 0: all weights
LR=${LR:-}                         # empty: [L] 1e-4 with LoRA, 1e-5 without
WARMUP_STEPS=${WARMUP_STEPS:-50}   # [L] a tenth of the steps
MAX_TOKENS=${MAX_TOKENS:-8192}     # [ours] prompts of 4,096, responses of 1,024 and room; a longer row stops the run
ATTENTION=${ATTENTION:-sdpa}       # [ours] needs no package; or flash_attention_2, where it is installed
# ---------------------------------------------------------------------------------------------------------------------

for name in NGPUS ROWS SAMPLE_BATCH_SIZE TRIES MAX_RESPONSE_LENGTH STEPS BATCH_SIZE; do
  [[ "$name=${!name}" != ROWS=all ]] || continue
  if [[ ! "${!name}" =~ ^[1-9][0-9]*$ ]]; then
    echo "SAYO-F23: a setting has to be a whole number, at least 1 | at $name | got ${!name} | fix: change it" >&2
    exit 2
  fi
done
if [[ -z "$ACCUMULATION" ]]; then
  ACCUMULATION=$(((64 + NGPUS * BATCH_SIZE / 2) / (NGPUS * BATCH_SIZE)))
  ACCUMULATION=$((ACCUMULATION < 1 ? 1 : ACCUMULATION))
fi

TRAIN_FILES=("$TRAIN_FILE")
if [[ -n "$DATA" ]]; then
  TRAIN_FILES=("$DATA"/train*.parquet)
  VAL_FILES=("$DATA"/val*.parquet)
  VAL_FILE=${VAL_FILES[0]} # of its first 256 rows the report is made
fi

if [[ "$LORA_RANK" != 0 ]]; then
  LR=${LR:-1e-4}
  WEIGHTS=(--lora-rank "$LORA_RANK" --lora-alpha $((2 * LORA_RANK)) --dtype bfloat16)
else
  # float32 weights in shards, bfloat16 products
  LR=${LR:-1e-5}
  WEIGHTS=(--dtype float32 --trainer-args '{"bf16": true, "fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2,
    "transformer_layer_cls_to_wrap": ["Qwen2_5_VLDecoderLayer"]}}')
fi
IMITATED=("${TRAIN_FILES[@]}")
[[ "$RESPOND" != 1 ]] || IMITATED=("$OUT/rows.parquet")

ON_ALL=(torchrun --standalone --nproc_per_node="$NGPUS" -m sayo_verl.focus)
ON_ONE=(python3 -m sayo_verl.focus)
SAMPLE=(respond --base "$MODEL_PATH" --rows "${TRAIN_FILES[@]}" --out "$OUT/rows.parquet"
  --tries "$TRIES" --max-new-tokens "$MAX_RESPONSE_LENGTH" --batch-size "$SAMPLE_BATCH_SIZE")
[[ "$ROWS" == all ]] || SAMPLE+=(--max-rows "$ROWS")
TRAIN=(train --base "$MODEL_PATH" --rows "${IMITATED[@]}"
  --out "$OUT/policy" --weight "$WEIGHT" --alpha "$ALPHA" --steps "$STEPS" --batch-size "$BATCH_SIZE"
  --accumulation "$ACCUMULATION" --learning-rate "$LR" --warmup-steps "$WARMUP_STEPS" --max-tokens "$MAX_TOKENS"
  --attention "$ATTENTION" --checkpointing "${WEIGHTS[@]}" "$@")
REPORT=(report --base "$MODEL_PATH" --after "$OUT/policy" --rows "$VAL_FILE"
  --out "$OUT" --alpha "$ALPHA" --attention "$ATTENTION" --dtype bfloat16 --max-rows 256)
NEXT="MODEL_PATH=$(printf '%q' "$(realpath -m "$OUT/policy")")"
[[ -z "$DATA" ]] || NEXT+=" DATA=$(printf '%q' "$DATA")"
NEXT+=" bash scripts/run_faithful_qwen2_5vl_7b.sh"
[[ -n "$DATA" ]] || NEXT+=" data.train_files=$(printf '%q' "$TRAIN_FILE") data.val_files=$(printf '%q' "$VAL_FILE")"

# Arguments of all steps before the first, which takes hours. Rows that are to be imitated come from TRAIN_FILES.
check_arguments() {
  if [[ "$RESPOND" == 1 ]]; then "${ON_ONE[@]}" "${SAMPLE[@]}" --check || return; fi
  "${ON_ONE[@]}" "${TRAIN[@]}" --check --rows "${TRAIN_FILES[@]}" || return
  "${ON_ONE[@]}" "${REPORT[@]}" --check
}

# Minutes of sampling by the arithmetic of docs/anchoring.md: 28 ms a token and batch of a 7B model, blocks of 4 batches.
# Arguments: rows, batches a block.
sampling() {
  local blocks=$((($1 + 4 * SAMPLE_BATCH_SIZE - 1) / (4 * SAMPLE_BATCH_SIZE))) minutes tenths
  minutes=$((((blocks + NGPUS - 1) / NGPUS * $2 * MAX_RESPONSE_LENGTH * 28 + 59999) / 60000))
  tenths=$(((10 * minutes + 30) / 60)) # of an hour
  if ((minutes < 120)); then echo "$minutes min"; else echo "$((tenths / 10)).$((tenths % 10)) h"; fi
}

if [[ "$DRY_RUN" == 1 ]]; then
  if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    CHECKED=$(check_arguments)
    CHECKED=$(sort -u <<<"$CHECKED" | paste -sd ';' | sed 's/;/; /g')
  else
    CHECKED="not checked: no Python 3.11 here"
  fi
  there() { if [[ -e "$1" ]]; then printf '%s' "$1"; else printf '%s - NOT THERE YET' "$1"; fi; }
  PER_STEP=$((NGPUS * BATCH_SIZE * ACCUMULATION)) HALF=0 LEFT=4
  for ((n = 0; n < TRIES; n++)); do HALF=$((HALF + LEFT)) LEFT=$((LEFT > 1 ? LEFT / 2 : 1)); done
  echo "model      $MODEL_PATH"
  for file in "${TRAIN_FILES[@]}"; do echo "rows       $(there "$file")"; done
  echo "held out   $(there "$VAL_FILE")"
  echo "arguments  ${CHECKED:-checked}"
  echo "weights    $([[ "$LORA_RANK" != 0 ]] && echo "LoRA rank $LORA_RANK and the row of <Focus>" || echo "all of the decoder")"
  if [[ "$RESPOND" == 1 ]]; then
    N=${ROWS/all/10000}
    echo "sampling   $(sampling "$N" "$HALF") for $([[ "$ROWS" != all ]] || echo "every ")$N rows if each try answers half" \
      "of them rightly, $(sampling "$N" $((4 * TRIES))) if none; by arithmetic for a 7B model, not measured"
  fi
  echo "per step   $PER_STEP rows, $STEPS steps, lr $LR"
  SEEN="$((PER_STEP * STEPS)) rows seen"
  if [[ "$RESPOND" == 1 && "$ROWS" != all ]]; then
    TENTHS=$((10 * PER_STEP * STEPS / ROWS))
    SEEN+=": $((TENTHS / 10)).$((TENTHS % 10)) passes if all $ROWS sampled rows are kept, more if fewer are"
  fi
  echo "training   $SEEN; time not estimated"
  if [[ "$RESPOND" == 1 ]]; then printf '1.         '; printf '%q ' "${ON_ALL[@]}" "${SAMPLE[@]}"; echo; fi
  printf '2.         '; printf '%q ' "${ON_ALL[@]}" "${TRAIN[@]}"; echo
  printf '3.         '; printf '%q ' "${ON_ONE[@]}" "${REPORT[@]}"; echo
  echo "then       $NEXT"
  echo "nothing was started"
  exit 0
fi

if [[ "$(nvidia-smi -L 2>/dev/null || true)" != GPU* ]]; then
  echo "SAYO-L21: no GPU on this machine | at $0 |" \
    "fix: look at the job with DRY_RUN=1, or anchor the tiny policy: bash scripts/run_faithful_anchor_tiny.sh" >&2
  exit 1
fi
if [[ -e "$OUT/policy" ]]; then
  echo "SAYO-F16: the folder has files | at $OUT/policy | fix: choose a new output folder (OUT=...)" >&2
  exit 2
fi
if ! python3 -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("sayo_verl", "peft", "accelerate"))))'; then
  bash scripts/setup_env.sh gpu
  export PATH="$(bash scripts/setup_env.sh --where gpu)/bin:$PATH"
fi

check_arguments
mkdir -p "$OUT"
[[ "$RESPOND" != 1 ]] || "${ON_ALL[@]}" "${SAMPLE[@]}"
"${ON_ALL[@]}" "${TRAIN[@]}"
"${ON_ONE[@]}" "${REPORT[@]}"
echo "policy   $OUT/policy"
echo "next     $NEXT"
