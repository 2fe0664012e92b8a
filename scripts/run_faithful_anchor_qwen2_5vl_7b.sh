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
# The folder it prints is MODEL_PATH of the reinforcement stage. docs/anchoring.md says how many hours the samples take.
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
TRAIN_FILE=${TRAIN_FILE:-data/faithful/train.parquet}   # rows with extra_info.boxes
VAL_FILE=${VAL_FILE:-data/faithful/val.parquet}
OUT=${OUT:-outputs/$NAME/$(date +%Y%m%d-%H%M%S)}
NGPUS=${NGPUS:-8}

RESPOND=${RESPOND:-1}              # 1: sample right answers to imitate; 0: the training rows have a column `response`
ROWS=${ROWS:-8192}                 # [ours] sampled rows, the first ones: half an hour on 8 GPUs; or all
TRIES=${TRIES:-4}                  # [ours] samples a row: at 50 % right answers a fifth would find 3 % more
SAMPLE_BATCH_SIZE=${SAMPLE_BATCH_SIZE:-32}              # [ours] 32 x 5,120 tokens are 9 GiB of KV cache
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-1024}        # [ours] half of the reinforcement stage's: time grows with it

WEIGHT=${WEIGHT:-1.0}              # [ours] lambda of L_anchor: it starts at 1.7 nats on the tiny task, the order of L_LM
ALPHA=${ALPHA:-0.1}                # [E] background share of the target
STEPS=${STEPS:-500}                # [ours] of 64 rows: four passes over 8,192; [L] has three
BATCH_SIZE=${BATCH_SIZE:-2}        # [ours] rows per GPU and forward: 9.3 GiB of float32 logits if both are 8,192 tokens
ACCUMULATION=${ACCUMULATION:-4}    # [ours] 64 rows a step on 8 GPUs; [L] 8 per GPU with LoRA
LORA_RANK=${LORA_RANK:-64}         # [ours] 8 in [L]: a token's attention is new, not a style; 0: all weights
LR=${LR:-}                         # empty: [L] 1e-4 with LoRA, 1e-5 without
WARMUP_STEPS=${WARMUP_STEPS:-50}   # [L] a tenth of the steps
MAX_TOKENS=${MAX_TOKENS:-8192}     # [ours] prompts of 4,096, responses of 1,024 and room; a longer row stops the run
ATTENTION=${ATTENTION:-sdpa}       # [ours] needs no package; or flash_attention_2, where it is installed
# ---------------------------------------------------------------------------------------------------------------------

TRAIN_FILES=("$TRAIN_FILE")
if [[ -n "$DATA" ]]; then
  TRAIN_FILES=("$DATA"/train-*.parquet)
  VAL_FILES=("$DATA"/val-*.parquet)
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

ON_ALL=(torchrun --standalone --nproc_per_node="$NGPUS" -m sayo_verl.anchoring)
SAMPLE=("${ON_ALL[@]}" respond --base "$MODEL_PATH" --rows "${TRAIN_FILES[@]}" --out "$OUT/rows.parquet"
  --tries "$TRIES" --max-new-tokens "$MAX_RESPONSE_LENGTH" --batch-size "$SAMPLE_BATCH_SIZE")
[[ "$ROWS" == all ]] || SAMPLE+=(--max-rows "$ROWS")
TRAIN=("${ON_ALL[@]}" train --base "$MODEL_PATH" --rows "${IMITATED[@]}"
  --out "$OUT/policy" --weight "$WEIGHT" --alpha "$ALPHA" --steps "$STEPS" --batch-size "$BATCH_SIZE"
  --accumulation "$ACCUMULATION" --learning-rate "$LR" --warmup-steps "$WARMUP_STEPS" --max-tokens "$MAX_TOKENS"
  --attention "$ATTENTION" --checkpointing "${WEIGHTS[@]}" "$@")
REPORT=(python3 -m sayo_verl.anchoring report --base "$MODEL_PATH" --after "$OUT/policy" --rows "$VAL_FILE"
  --out "$OUT" --alpha "$ALPHA" --attention "$ATTENTION" --dtype bfloat16 --max-rows 256)

if [[ "$DRY_RUN" == 1 ]]; then
  there() { if [[ -e "$1" ]]; then printf '%s' "$1"; else printf '%s - NOT THERE YET' "$1"; fi; }
  echo "model      $MODEL_PATH"
  for file in "${TRAIN_FILES[@]}"; do echo "rows       $(there "$file")"; done
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
[[ "$RESPOND" != 1 ]] || "${SAMPLE[@]}"
"${TRAIN[@]}"
"${REPORT[@]}"
echo "policy   $OUT/policy"
