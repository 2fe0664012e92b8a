#!/usr/bin/env bash
# attn_faithful, anchoring stage (our reading of Faithful-MR1) | Qwen2.5-VL-7B | transformers Trainer | GPUs
#
# The abstract of "Faithful Multimodal Reasoning via Anchoring and Reinforcing Visual Attention" (arXiv 2605.22072) names
# the models, Qwen2.5-VL-Instruct 3B and 7B, and a <Focus> token whose attention is supervised against image regions.
# Every number below is ours. This script was composed and its plan printed; it was not run on GPUs.
#
#   TRAIN_FILE=... VAL_FILE=... bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh
#   DRY_RUN=1 bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh               print the plan; no GPU
#   LORA_RANK=0 bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh             all weights of the decoder, sharded (FSDP2)
#   bash scripts/run_faithful_anchor_qwen2_5vl_7b.sh --layers 14 18          any flag of `train` goes at the end
#
# The folder it prints is MODEL_PATH of the reinforcement stage.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"

# ---------------------------------------------------------------------------------------------------------------------
NAME=${NAME:-faithful_anchor_qwen2_5vl_7b}
DRY_RUN=${DRY_RUN:-0}
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-VL-7B-Instruct}
TRAIN_FILE=${TRAIN_FILE:-data/faithful/train.parquet}   # rows with extra_info.boxes
VAL_FILE=${VAL_FILE:-data/faithful/val.parquet}
OUT=${OUT:-outputs/$NAME/$(date +%Y%m%d-%H%M%S)}
NGPUS=${NGPUS:-8}

RESPOND=${RESPOND:-1}              # 1: sample right answers to imitate (one GPU); 0: TRAIN_FILE has a column `response`
TRIES=${TRIES:-4}                  # samples per row
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-1024}

WEIGHT=${WEIGHT:-1.0}              # lambda of L_anchor
ALPHA=${ALPHA:-0.1}                # background share of the target
STEPS=${STEPS:-500}
BATCH_SIZE=${BATCH_SIZE:-2}        # rows per GPU and forward
ACCUMULATION=${ACCUMULATION:-4}
LORA_RANK=${LORA_RANK:-64}         # 0: all weights of the decoder
LR=${LR:-}                         # empty: 1e-4 with LoRA, 1e-5 without
MAX_TOKENS=${MAX_TOKENS:-8192}     # a longer row stops the run
ATTENTION=${ATTENTION:-sdpa}       # or flash_attention_2, where it is installed
# ---------------------------------------------------------------------------------------------------------------------

if [[ "$LORA_RANK" != 0 ]]; then
  LR=${LR:-1e-4}
  WEIGHTS=(--lora-rank "$LORA_RANK" --lora-alpha $((2 * LORA_RANK)) --dtype bfloat16)
else
  # float32 weights in shards, bfloat16 products
  LR=${LR:-1e-5}
  WEIGHTS=(--dtype float32 --trainer-args '{"bf16": true, "fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2,
    "transformer_layer_cls_to_wrap": ["Qwen2_5_VLDecoderLayer"]}}')
fi
ROWS="$TRAIN_FILE"
[[ "$RESPOND" != 1 ]] || ROWS="$OUT/rows.parquet"

SAMPLE=(python3 -m sayo_verl.anchoring respond --base "$MODEL_PATH" --rows "$TRAIN_FILE" --out "$OUT/rows.parquet"
  --tries "$TRIES" --max-new-tokens "$MAX_RESPONSE_LENGTH")
TRAIN=(torchrun --standalone --nproc_per_node="$NGPUS" -m sayo_verl.anchoring train --base "$MODEL_PATH" --rows "$ROWS"
  --out "$OUT/policy" --weight "$WEIGHT" --alpha "$ALPHA" --steps "$STEPS" --batch-size "$BATCH_SIZE"
  --accumulation "$ACCUMULATION" --learning-rate "$LR" --warmup-steps 20 --max-tokens "$MAX_TOKENS"
  --attention "$ATTENTION" --checkpointing "${WEIGHTS[@]}" "$@")
REPORT=(python3 -m sayo_verl.anchoring report --base "$MODEL_PATH" --after "$OUT/policy" --rows "$VAL_FILE"
  --out "$OUT" --alpha "$ALPHA" --attention "$ATTENTION" --dtype bfloat16 --max-rows 256)

if [[ "$DRY_RUN" == 1 ]]; then
  there() { if [[ -e "$1" ]]; then printf '%s' "$1"; else printf '%s - NOT THERE YET' "$1"; fi; }
  echo "model      $MODEL_PATH"
  echo "rows       $(there "$TRAIN_FILE")"
  echo "held out   $(there "$VAL_FILE")"
  echo "weights    $([[ "$LORA_RANK" != 0 ]] && echo "LoRA rank $LORA_RANK and the row of <Focus>" || echo "all of the decoder")"
  echo "per step   $((NGPUS * BATCH_SIZE * ACCUMULATION)) rows, $STEPS steps, lr $LR"
  if [[ "$RESPOND" == 1 ]]; then printf '1.         '; printf '%q ' "${SAMPLE[@]}"; echo; fi
  printf '2.         '; printf '%q ' "${TRAIN[@]}"; echo
  printf '3.         '; printf '%q ' "${REPORT[@]}"; echo
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

mkdir -p "$OUT"
[[ "$RESPOND" != 1 ]] || CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" "${SAMPLE[@]}"
"${TRAIN[@]}"
"${REPORT[@]}"
echo "policy   $OUT/policy"
