#!/usr/bin/env bash
# SAYO (attn_region) | Qwen3-VL-8B | vLLM rollouts | FSDP | GPUs
#
# The job of "Do MLLMs Really See It" (arXiv 2602.08241) on verl's own launcher. Sources of the values: [P] the paper,
# [C] the released training script and code (Cratileo/Sayo, train/grpo.sh), [T] TRL 0.25.1's default, which that script
# leaves in place, [ours] not stated anywhere.
#
#   DATA=data/sayo bash scripts/run_sayo_qwen3vl_8b.sh                              one node, 8 GPUs
#   DRY_RUN=1 bash scripts/run_sayo_qwen3vl_8b.sh                                   compose, check, print the plan; no GPU
#   RAY_ADDRESS=auto NNODES=2 bash scripts/run_sayo_qwen3vl_8b.sh                   on a node of a Ray cluster that is up
#   bash scripts/run_sayo_qwen3vl_8b.sh algorithm.adv_estimator=rloo                any hydra override goes at the end
#
# The paired baseline is scripts/run_grpo_qwen3vl_8b.sh. scripts/run_sayo_qwen3vl_4b_1gpu.sh is the job for one card.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
source scripts/lib.sh
help_or_go_on "$@"
GIVEN=$(given_settings)

# ---------------------------------------------------------------------------------------------------------------------
ADV_ESTIMATOR=${ADV_ESTIMATOR:-attn_region}                  # the switch: attn_region, or grpo for verl's own
NAME=${NAME:-sayo_qwen3vl_8b}
DRY_RUN=${DRY_RUN:-0}

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-VL-8B-Instruct}          # [P] Qwen3-VL 4B and 8B
DATA=${DATA:-data/sayo}                                      # of `sayo prepare`; [P] GQA, ReFocus; [C] 20,000 rows
TRAIN_FILE=${TRAIN_FILE:-}                                   # a parquet or a list of them, instead of DATA's
VAL_FILE=${VAL_FILE:-}
OUT=${OUT:-outputs/$NAME/$(date +%Y%m%d-%H%M%S)}
RESUME=${RESUME:-}                                           # folder of an earlier run to go on with, instead of OUT

NNODES=${NNODES:-1}
NGPUS_PER_NODE=${NGPUS_PER_NODE:-8}                          # [P] 6 H200; 8 is the usual node [ours]

FORMAT_WEIGHT=${FORMAT_WEIGHT:-1.0}                          # [P] r_f
ACCURACY_WEIGHT=${ACCURACY_WEIGHT:-0.0}                      # [P][C] no accuracy reward

GROUP_SIZE=${GROUP_SIZE:-16}                                 # [C] num_generations 16
TEMPERATURE=${TEMPERATURE:-1.0}                              # [C]
TOP_P=${TOP_P:-0.9}                                          # [C]
TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-24}                     # [C] 64 completions x 6 devices / 16 per prompt
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-6500}                 # [C]
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-110}              # [C] max completion 110

LR=${LR:-5e-6}                                               # [C]; constant here, linear decay there [T]: verl has none
WEIGHT_DECAY=${WEIGHT_DECAY:-0.01}                           # [C]
GRAD_CLIP=${GRAD_CLIP:-0.8}                                  # [C]
KL_COEF=${KL_COEF:-0.001}                                    # [P] 1e-3 [C] beta 0.001
LORA_RANK=${LORA_RANK:-16}                                   # [C]
LORA_ALPHA=${LORA_ALPHA:-32}                                 # [C]
EPOCHS=${EPOCHS:-4}                                          # [P] 4; the released script has 3
LORA_EXCLUDE=${LORA_EXCLUDE:-.*visual.*}                     # [ours] [C] has all-linear; vLLM serves adapters of the decoder
PPO_MAX_TOKEN_LEN_PER_GPU=${PPO_MAX_TOKEN_LEN_PER_GPU:-16384}  # [ours] two rows of full length, 4.6 GiB of logits
ROLLOUT_TP=${ROLLOUT_TP:-1}                                  # [ours] 16.3 GiB of weights leave room on one card
ROLLOUT_GPU_MEM_UTIL=${ROLLOUT_GPU_MEM_UTIL:-0.6}            # [ours] of 80 GB: 33 sequences of full length beside the actor
SAVE_FREQ=${SAVE_FREQ:-100}                                  # [ours] steps, of 833 an epoch with 20,000 rows
TEST_FREQ=${TEST_FREQ:-50}                                   # [ours]
LOGGER=${LOGGER:-[console,file]}                             # such as [console,file,wandb]
# ---------------------------------------------------------------------------------------------------------------------

place_inputs
need_cluster "$@"

if [[ "$DRY_RUN" != 1 && "$(nvidia-smi -L 2>/dev/null || true)" != GPU* && -z "${RAY_ADDRESS:-}" ]]; then
  echo "SAYO-L21: no GPU on this machine and no RAY_ADDRESS of a cluster that has some | at $0 |" \
    "fix: look at the job with DRY_RUN=1, or train the tiny task here: bash scripts/run_sayo_tiny.sh" >&2
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

ALGORITHM=(
  algorithm.adv_estimator="$ADV_ESTIMATOR"
  algorithm.use_kl_in_reward=False
)

ROWS=(
  data.train_files="$TRAIN_FILE"
  data.val_files="$VAL_FILE"
  data.image_key=images
  data.image_patch_size=16
  data.train_batch_size="$TRAIN_BATCH_SIZE"
  data.max_prompt_length="$MAX_PROMPT_LENGTH"
  data.max_response_length="$MAX_RESPONSE_LENGTH"
  data.filter_overlong_prompts=True
  data.truncation=error
)

REWARD=(
  reward.custom_reward_function.path=pkg://sayo_verl.reward
  reward.custom_reward_function.name=compute_score
  +reward.custom_reward_function.reward_kwargs.format_weight="$FORMAT_WEIGHT"
  +reward.custom_reward_function.reward_kwargs.accuracy_weight="$ACCURACY_WEIGHT"
)

MODEL=(
  actor_rollout_ref.model.path="$MODEL_PATH"
  actor_rollout_ref.model.use_remove_padding=True
  actor_rollout_ref.model.enable_gradient_checkpointing=True
  actor_rollout_ref.model.lora_rank="$LORA_RANK"
  actor_rollout_ref.model.lora_alpha="$LORA_ALPHA"
  actor_rollout_ref.model.target_modules=all-linear
  actor_rollout_ref.model.exclude_modules="'$LORA_EXCLUDE'"
)

ACTOR=(
  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.actor.optim.lr="$LR"
  actor_rollout_ref.actor.optim.weight_decay="$WEIGHT_DECAY"
  actor_rollout_ref.actor.grad_clip="$GRAD_CLIP"
  actor_rollout_ref.actor.ppo_mini_batch_size="$TRAIN_BATCH_SIZE"
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$PPO_MAX_TOKEN_LEN_PER_GPU"
  actor_rollout_ref.actor.use_kl_loss=True
  actor_rollout_ref.actor.kl_loss_coef="$KL_COEF"
  actor_rollout_ref.actor.kl_loss_type=low_var_kl
  actor_rollout_ref.actor.entropy_coeff=0
)

ROLLOUT=(
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n="$GROUP_SIZE"
  actor_rollout_ref.rollout.temperature="$TEMPERATURE"
  actor_rollout_ref.rollout.top_p="$TOP_P"
  actor_rollout_ref.rollout.tensor_model_parallel_size="$ROLLOUT_TP"
  actor_rollout_ref.rollout.gpu_memory_utilization="$ROLLOUT_GPU_MEM_UTIL"
  # unset it is the model's 262,144 tokens, for which vLLM reserves more KV cache than the card has
  actor_rollout_ref.rollout.max_model_len=$((MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH))
  actor_rollout_ref.rollout.load_format=safetensors
  actor_rollout_ref.rollout.layered_summon=True
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

exec python3 -m sayo_verl.main_ppo \
  "${ALGORITHM[@]}" "${ROWS[@]}" "${REWARD[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
