#!/usr/bin/env bash
# Any method, SAYO if none is named | tiny Qwen3-VL on drawn scenes | CPU
#
# From nothing to a table, curves and a page on a machine without a GPU: makes the
# environment, the scenes and a warmed-up tiny policy, trains on real verl + Ray +
# TransferQueue + FSDP2 + vLLM, and prints where the results are. What exists and
# is valid is reused, with a message. Its values: configs/job/tiny.yaml.
# Variables: scripts/run.sh --help.
#
#   METHOD=dual bash scripts/run_tiny.sh          VGPO, on DAPO
#   METHOD=anchor bash scripts/run_tiny.sh        our reading of AT-RL
#   METHOD=faithful bash scripts/run_tiny.sh      our reading of Faithful-MR1
#   METHOD=sensitivity bash scripts/run_tiny.sh   VPPO, on DAPO
#   METHOD=evidence bash scripts/run_tiny.sh      Evidence-RL
#   METHOD=region_dual bash scripts/run_tiny.sh   a mix of two
#   METHOD=grpo bash scripts/run_tiny.sh          baseline; dapo: of VGPO, VPPO
#   bash scripts/run_tiny.sh trainer.total_training_steps=60 \
#       algorithm.attn.region.entropy_fraction=1.0
#   RESUME=outputs/region_tiny/<time> bash scripts/run_tiny.sh \
#       trainer.total_training_steps=60
#       resume a run that had trainer.save_freq=10, say
#   DATA=$(sayo prepare synthetic --region distractor) bash scripts/run_tiny.sh
#       the wrong-box control
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
source scripts/lib.sh
help_or_go_on "$@"
export JOB=tiny
[[ -n "${OWN_METHOD:-}" ]] || METHOD=${METHOD:-region} # run_sayo_tiny.sh and run_grpo_tiny.sh have theirs
place_run "$@"
# A Ray of its own, whatever else runs on this machine
[[ -n "${RAY_ADDRESS:-}" ]] || set -- ++ray_kwargs.ray_init.address=local "$@"
check_names "$@"
unset VERL_FILE_LOGGER_PATH # sayo watch and sayo report look in $OUT
if dry_run; then VERL_PLATFORM=cpu exec bash scripts/run.sh "$@"; fi

enter_environment cpu
tiny_environment

[[ -n "${DATA:-}" || " $*" == *"data.train_files="* ]] || DATA=$(sayo prepare synthetic --out .sayo)
[[ -n "${MODEL_PATH:-}" ]] || MODEL_PATH=$(sayo prepare policy --out .sayo)
export DATA MODEL_PATH

failed=0
LOGGED=$(stat -c %s "$OUT/train.log" 2>/dev/null || echo 0) # by earlier attempts
# The launcher's last lines, repeated after the report: how to resume, and why the run failed. A launcher that was killed
# with signal 9 printed none.
say_last() {
  local tracker="$OUT/checkpoints/latest_checkpointed_iteration.txt" log
  log=$(tail -c "+$((LOGGED + 1))" "$OUT/train.log")
  grep "^to resume after step" <<<"$log" | tail -n 1 ||
    [[ "$failed" != 137 || ! -s "$tracker" ]] || echo "to resume after step $(<"$tracker"): $SAYO_RESUME_COMMAND"
  ((!failed)) || tail -n 3 <<<"$log" | grep "^SAYO-" | tail -n 1 || true
}
trap say_last EXIT
run_to_its_end sayo watch "$OUT" -- bash scripts/run.sh "$@" || failed=$?
# Also of a run that failed, if it has a step
((failed)) && ! grep -qs . "$OUT"/metrics*.jsonl || sayo report "$OUT"
exit "$failed"
