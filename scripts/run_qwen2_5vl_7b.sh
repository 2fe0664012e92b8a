#!/usr/bin/env bash
# Any method | Qwen2.5-VL-7B | vLLM rollouts | FSDP2 | GPUs
#
# The job of "Visually-Guided Policy Optimization" (VGPO, arXiv 2604.09349), on which the other methods run too: AT-RL and
# Faithful-MR1 name this model, but no values. Sources: [C] the released training script (wzb-bupt/VGPO,
# train_vgpo_7B.sh), [ours] not stated anywhere. What a method sets stands in configs/method, what GRPO and DAPO set in
# configs/rl.
#
#   METHOD=dual bash scripts/run_qwen2_5vl_7b.sh          VGPO on DAPO         = scripts/run_vgpo_qwen2_5vl_7b.sh
#   METHOD=dapo bash scripts/run_qwen2_5vl_7b.sh          its baseline         = scripts/run_dapo_qwen2_5vl_7b.sh
#   METHOD=anchor bash scripts/run_qwen2_5vl_7b.sh        reading of AT-RL     = scripts/run_atrl_qwen2_5vl_7b.sh
#   METHOD=faithful bash scripts/run_qwen2_5vl_7b.sh      r. of Faithful-MR1   = scripts/run_faithful_qwen2_5vl_7b.sh
#   METHOD=grpo bash scripts/run_qwen2_5vl_7b.sh          their baseline       = scripts/run_grpo_qwen2_5vl_7b.sh
#   DRY_RUN=1 METHOD=dual bash scripts/run_qwen2_5vl_7b.sh                       compose, check, print the plan; no GPU
#   RAY_ADDRESS=auto NNODES=2 METHOD=dual bash scripts/run_qwen2_5vl_7b.sh       on a node of a Ray cluster that is up
#   METHOD=dual bash scripts/run_qwen2_5vl_7b.sh actor_rollout_ref.rollout.n=16  any hydra override goes at the end
#
# Data: METHOD=region, region_dual, and faithful with causal_unit=region need boxes in some rows; the others need none. The
# default files are [C]'s data as parquet files of verl's own format ("The row contract" in docs/data.md). Nothing here
# downloads or converts them. Give two files of your own, TRAIN_FILE=... VAL_FILE=..., or a folder of `sayo prepare`,
# DATA=data/gqa. Without boxes: `sayo prepare jsonl --keep-without-boxes`, with "boxes": [] in each line.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
source scripts/lib.sh
help_or_go_on "$@"
GIVEN=$(given_settings)

# ---------------------------------------------------------------------------------------------------------------------
METHOD=${METHOD:-dual}                                       # a file of configs/method, or grpo or dapo for verl's own code
case "$METHOD" in
  dual | dual_released | dapo) RL=${RL:-dapo} ;;             # [C] VGPO trains on DAPO
  *) RL=${RL:-grpo} ;;                                       # [ours] AT-RL and Faithful-MR1 name no more than GRPO
esac
NAME=${NAME:-${METHOD}_qwen2_5vl_7b}
DRY_RUN=${DRY_RUN:-0}

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-VL-7B-Instruct}        # [C]
DATA=${DATA:-}                                               # a folder of `sayo prepare`, instead of the two files
TRAIN_FILE=${TRAIN_FILE:-data/virl39k/train.parquet}         # [C] ViRL39K, 38,870 rows
VAL_FILE=${VAL_FILE:-data/mmk12/val.parquet}                 # [C] MMK12 test
OUT=${OUT:-outputs/$NAME/$(date +%Y%m%d-%H%M%S)}
RESUME=${RESUME:-}                                           # folder of an earlier run to go on with, instead of OUT

NNODES=${NNODES:-1}
NGPUS_PER_NODE=${NGPUS_PER_NODE:-8}                          # [C]

FORMAT_WEIGHT=${FORMAT_WEIGHT:-0.0}                          # [C] accuracy only
ACCURACY_WEIGHT=${ACCURACY_WEIGHT:-1.0}                      # [C]; theirs is \boxed{} by mathruler, ours <answer> by text
REWARD_PATH=${REWARD_PATH:-pkg://sayo_verl.reward}           # [ours] another reward function must return acc, too
REWARD_NAME=${REWARD_NAME:-compute_score}

GROUP_SIZE=${GROUP_SIZE:-8}                                  # [C]
TEMPERATURE=${TEMPERATURE:-1.0}                              # [C]
TOP_P=${TOP_P:-0.99}                                         # [C]
TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-512}                    # [C] prompts per step
MINI_BATCH_SIZE=${MINI_BATCH_SIZE:-128}                      # [C] prompts per update
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-4096}                 # [C]
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-2048}             # [C]

LR=${LR:-1e-6}                                               # [C] constant
WEIGHT_DECAY=${WEIGHT_DECAY:-0.01}                           # [C]
GRAD_CLIP=${GRAD_CLIP:-1.0}                                  # [C]
EPOCHS=${EPOCHS:-2}                                          # [C]
PPO_MAX_TOKEN_LEN_PER_GPU=${PPO_MAX_TOKEN_LEN_PER_GPU:-16384}  # [ours] two rows of full length, 4.6 GiB of logits
ROLLOUT_TP=${ROLLOUT_TP:-2}                                  # [C]
ROLLOUT_GPU_MEM_UTIL=${ROLLOUT_GPU_MEM_UTIL:-0.6}            # [ours] of 80 GB: 234 sequences of full length on two cards
SAVE_FREQ=${SAVE_FREQ:-25}                                   # [ours] steps, of 75 an epoch: a checkpoint has 93 GiB
TEST_FREQ=${TEST_FREQ:-25}                                   # [ours]
LOGGER=${LOGGER:-[console,file]}                             # such as [console,file,wandb]
# ---------------------------------------------------------------------------------------------------------------------

if [[ "$METHOD" != grpo && "$METHOD" != dapo && ! -f "configs/method/$METHOD.yaml" ]]; then
  echo "SAYO-L30: there is no method $METHOD | at METHOD | wanted grpo, dapo or a file of configs/method:" \
    "$(cd configs/method && ls | sed 's/\.yaml//' | paste -sd ' ') | fix: correct the name" >&2
  exit 2
fi
if [[ -n "$DATA" ]]; then TRAIN_FILE='' VAL_FILE=''; fi
place_inputs
need_cluster "$@"

if [[ "$DRY_RUN" != 1 && "$(nvidia-smi -L 2>/dev/null || true)" != GPU* && -z "${RAY_ADDRESS:-}" ]]; then
  echo "SAYO-L21: no GPU on this machine and no RAY_ADDRESS of a cluster that has some | at $0 |" \
    "fix: look at the job with DRY_RUN=1, or train the tiny task here: METHOD=$METHOD bash scripts/run_tiny.sh" >&2
  exit 1
fi

place_output "$@"

# An active Python that has sayo-verl is used as it is (a verl container, say); otherwise one is made.
if ! python3 -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("sayo_verl") and u.find_spec("verl")))'; then
  if [[ "$DRY_RUN" == 1 ]]; then STACK=cpu; else STACK=gpu; fi
  bash scripts/setup_env.sh "$STACK"
  export PATH="$(bash scripts/setup_env.sh --where "$STACK")/bin:$PATH"
fi
[[ "$DRY_RUN" != 1 ]] || export VERL_PLATFORM=${VERL_PLATFORM:-cpu} VERL_LOGGING_LEVEL=${VERL_LOGGING_LEVEL:-WARNING}
export VERL_USE_EXTERNAL_MODULES=sayo_verl.plugin

ALGORITHM=(+rl="$RL")
case "$METHOD" in
  grpo | dapo) ALGORITHM+=(algorithm.adv_estimator=grpo) ;;
  *) ALGORITHM+=(+method="$METHOD") ;;
esac

ROWS=(
  data.train_files="$TRAIN_FILE"
  data.val_files="$VAL_FILE"
  data.image_key=images
  data.image_patch_size=14
  data.train_batch_size="$TRAIN_BATCH_SIZE"
  data.max_prompt_length="$MAX_PROMPT_LENGTH"
  data.max_response_length="$MAX_RESPONSE_LENGTH"
  data.filter_overlong_prompts=True
  data.truncation=error
)

REWARD=(
  reward.custom_reward_function.path="$REWARD_PATH"
  reward.custom_reward_function.name="$REWARD_NAME"
  +reward.custom_reward_function.reward_kwargs.format_weight="$FORMAT_WEIGHT"
  +reward.custom_reward_function.reward_kwargs.accuracy_weight="$ACCURACY_WEIGHT"
)

MODEL=(
  actor_rollout_ref.model.path="$MODEL_PATH"
  actor_rollout_ref.model.use_remove_padding=True
  actor_rollout_ref.model.enable_gradient_checkpointing=True
)

ACTOR=(
  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.actor.optim.lr="$LR"
  actor_rollout_ref.actor.optim.weight_decay="$WEIGHT_DECAY"
  actor_rollout_ref.actor.grad_clip="$GRAD_CLIP"
  actor_rollout_ref.actor.ppo_mini_batch_size="$MINI_BATCH_SIZE"
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$PPO_MAX_TOKEN_LEN_PER_GPU"
)

ROLLOUT=(
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n="$GROUP_SIZE"
  actor_rollout_ref.rollout.temperature="$TEMPERATURE"
  actor_rollout_ref.rollout.top_p="$TOP_P"
  actor_rollout_ref.rollout.tensor_model_parallel_size="$ROLLOUT_TP"
  actor_rollout_ref.rollout.gpu_memory_utilization="$ROLLOUT_GPU_MEM_UTIL"
  actor_rollout_ref.rollout.max_model_len=$((MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH))
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu="$PPO_MAX_TOKEN_LEN_PER_GPU"
  actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
  actor_rollout_ref.ref.log_prob_max_token_len_per_gpu="$PPO_MAX_TOKEN_LEN_PER_GPU"
)

TRAINER=(
  trainer.experiment_name="$NAME"
  trainer.logger="$LOGGER"
  trainer.nnodes="$NNODES"
  trainer.n_gpus_per_node="$NGPUS_PER_NODE"
  trainer.total_epochs="$EPOCHS"
  trainer.save_freq="$SAVE_FREQ"
  trainer.test_freq="$TEST_FREQ"
  trainer.max_actor_ckpt_to_keep=2
  trainer.v1.sampler.sync_refill_failed_groups=True
  trainer.default_local_dir="$OUT/checkpoints"
  +ray_kwargs.ray_init.include_dashboard=False
  hydra.run.dir="$OUT/hydra$ATTEMPT"
)
# A dry run leaves no folder behind.
[[ "$DRY_RUN" != 1 ]] || TRAINER+=(sayo.dry_run=True hydra.run.dir=. hydra.output_subdir=null hydra/job_logging=none)

exec python3 -m sayo_verl.main_ppo --config-dir configs \
  "${ALGORITHM[@]}" "${ROWS[@]}" "${REWARD[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
