#!/usr/bin/env bash
# Any method | tiny Qwen3-VL on drawn scenes | vLLM rollouts | FSDP2 | CPU
#
# From nothing to a table and curves on a machine without a GPU: makes the environment, the scenes and a warmed-up tiny
# policy, trains on real verl + Ray + TransferQueue + FSDP2 + vLLM, and says where the results lie. What is there and
# right is reused, and said so. Every variable below can be set from outside; hydra overrides go at the end:
#
#   bash scripts/run_tiny.sh                                   SAYO
#   METHOD=dual bash scripts/run_tiny.sh                       VGPO, on DAPO
#   METHOD=anchor bash scripts/run_tiny.sh                     our reading of AT-RL
#   METHOD=faithful bash scripts/run_tiny.sh                   our reading of Faithful-MR1
#   METHOD=region_dual bash scripts/run_tiny.sh                a mix of two
#   METHOD=grpo bash scripts/run_tiny.sh                       the baseline; METHOD=dapo that of VGPO
#   STEPS=60 bash scripts/run_tiny.sh algorithm.attn.region.entropy_fraction=1.0
#   RESUME=outputs/region_tiny/<time> STEPS=60 bash scripts/run_tiny.sh   go on with a run that had SAVE_FREQ=10, say
#
# A method is a file of configs/method; a name that is none of them is refused.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
source scripts/lib.sh
help_or_go_on "$@"
GIVEN=$(given_settings)

# ---------------------------------------------------------------------------------------------------------------------
METHOD=${METHOD:-region}                        # a file of configs/method, or grpo or dapo for verl's own code
case "$METHOD" in
  dual | dual_released | dapo) RL=${RL:-dapo} ;;
  *) RL=${RL:-plain} ;;
esac                                            # RL: a file of configs/rl below the method, or plain: verl's defaults
NAME=${NAME:-${METHOD}_tiny}
STEPS=${STEPS:-30}
OUT=${OUT:-outputs/$NAME/$(date +%Y%m%d-%H%M%S)}
RESUME=${RESUME:-}                              # folder of an earlier run to go on with, instead of OUT
CACHE=${CACHE:-.sayo}                           # scenes and policies, each in a folder named after its settings
SEED=${SEED:-0}                                 # order of the prompts; two runs still sample differently
REGION=${REGION:-target}                        # whose box is rewarded; "distractor" is the wrong-box control
POLICY=${POLICY:-}                              # a policy folder; empty: the warmed-up tiny policy

TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-16}        # prompts
GROUP_SIZE=${GROUP_SIZE:-8}                     # rollouts per prompt
LR=${LR:-3e-4}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-32}
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-24}
REGION_WEIGHT=${REGION_WEIGHT:-1.0}             # of r_v
FORMAT_WEIGHT=${FORMAT_WEIGHT:-1.0}             # of r_f
ACCURACY_WEIGHT=${ACCURACY_WEIGHT:-1.0}         # w_acc; the paper has 0
TEST_FREQ=${TEST_FREQ:-$STEPS}
SAVE_FREQ=${SAVE_FREQ:--1}                      # -1: no checkpoints
# ---------------------------------------------------------------------------------------------------------------------

if [[ "$METHOD" != grpo && "$METHOD" != dapo && ! -f "configs/method/$METHOD.yaml" ]]; then
  echo "SAYO-L30: there is no method $METHOD | at METHOD | wanted grpo, dapo or a file of configs/method:" \
    "$(cd configs/method && ls | sed 's/\.yaml//' | paste -sd ' ') | fix: correct the name" >&2
  exit 2
fi
unset VERL_FILE_LOGGER_PATH # sayo watch and sayo report look in $OUT
place_output "$@"

bash scripts/setup_env.sh cpu
VENV="$(bash scripts/setup_env.sh --where cpu)"
export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"

export VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=sayo_verl.plugin
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false
export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# Two cores and half a dozen processes: no idle workers beside them, no compiler, one thread each.
export RAY_enable_worker_prestart=0 RAY_prestart_worker_first_driver=0
export TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1

SCENES=$(sayo prepare synthetic --out "$CACHE" --region "$REGION")
[[ -n "$POLICY" ]] || POLICY=$(sayo prepare policy --out "$CACHE")

ALGORITHM=()
[[ "$RL" == plain ]] || ALGORITHM+=(+rl="$RL")
case "$METHOD" in
  grpo | dapo) ALGORITHM+=(algorithm.adv_estimator=grpo) ;;
  *) ALGORITHM+=(+method="$METHOD") ;;
esac
[[ "$METHOD" != region* ]] || ALGORITHM+=(algorithm.attn.region.weight="$REGION_WEIGHT")

DATA=(
  data.train_files="$SCENES/train.parquet"
  data.val_files="$SCENES/val.parquet"
  data.image_key=images
  data.seed="$SEED"
  data.train_batch_size="$TRAIN_BATCH_SIZE"
  data.val_batch_size=256
  data.max_prompt_length="$MAX_PROMPT_LENGTH"
  data.max_response_length="$MAX_RESPONSE_LENGTH"
  data.filter_overlong_prompts=False
  data.truncation=error
)

REWARD=(
  reward.custom_reward_function.path=pkg://sayo_verl.reward
  reward.custom_reward_function.name=compute_score
  +reward.custom_reward_function.reward_kwargs.format_weight="$FORMAT_WEIGHT"
  +reward.custom_reward_function.reward_kwargs.accuracy_weight="$ACCURACY_WEIGHT"
)

ACTOR=(
  actor_rollout_ref.model.path="$POLICY"
  actor_rollout_ref.actor.optim.lr="$LR"
  actor_rollout_ref.actor.ppo_mini_batch_size="$TRAIN_BATCH_SIZE"
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096
  # the first three are what a run resumes from, the last is what `sayo evaluate` reads
  actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]
)

ROLLOUT=(
  actor_rollout_ref.rollout.n="$GROUP_SIZE"
  actor_rollout_ref.rollout.seed="$SEED"
  actor_rollout_ref.rollout.max_model_len=$((MAX_PROMPT_LENGTH + MAX_RESPONSE_LENGTH))
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=4096
)

TRAINER=(
  trainer.experiment_name="$NAME"
  trainer.total_epochs=1000
  trainer.total_training_steps="$STEPS"
  trainer.val_before_train=False
  trainer.test_freq="$TEST_FREQ"
  trainer.save_freq="$SAVE_FREQ"
  trainer.resume_mode="$([[ -n "$RESUME" ]] && echo auto || echo disable)"
  trainer.default_local_dir="$OUT/checkpoints"
  hydra.run.dir="$OUT/hydra$ATTEMPT"
)

# The launcher's last word, after the report as well.
trap 'grep "^to resume after step" "$OUT/train.log" | tail -n 1 || true' EXIT
sayo watch "$OUT" --steps "$STEPS" -- \
  python -m sayo_verl.main_ppo --config-dir configs +hardware=cpu \
  "${ALGORITHM[@]}" "${DATA[@]}" "${REWARD[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"

sayo report "$OUT"
