#!/usr/bin/env bash
# Evaluates a checkpoint or a model on public benchmarks with lmms-eval, beside
# the numbers of the paper.
#
#   bash scripts/eval_lmms.sh MODEL SET [OPTIONS]
#
# MODEL is a checkpoint of a run (.../global_step_N/actor: merged with verl's own
# merger first), a model folder, or a name of the hub. SET is sayo (the paper's
# Table 1), vgpo, scenes (rows of --data; needs no network), or tasks of lmms-eval
# with commas between them. The sets are files of configs/eval. docs/evaluation.md
# says what the numbers can be compared with.
#
#   --prompt NAME         reasoning (default: <think> ... <answer> ...) or direct;
#                         used where the harness has both
#   --sampled N           avg@N at --temperature T (default 1.0); greedy without
#                         it
#   --attention NAME      flash_attention_2 (default on GPUs), sdpa (default on a
#                         CPU), eager; logged with the scores
#   --model-class NAME    class of lmms-eval; default vllm on GPUs, on a CPU the
#                         one of the model's family
#   --max-new-tokens N    longest answer; default: each task's own
#   --data FILE           with SET scenes: a parquet file of the data contract, or
#                         a folder of `sayo prepare`
#   --no-judged           leaves out benchmarks that an LLM judges
#   --limit N             the first N questions of each task, for a trial
#   --gpus N              tensor parallel size of vLLM, default 1
#   --out FOLDER          of results.md, results.json and the answers; default
#                         outputs/eval/<set>-<time>
#
#   DRY_RUN=1             print the whole plan, without network, and stop
#   SAYO_EVAL_VENV        folder of the harness's environment; default .venv-eval
#                         (.venv-eval-gpu)
#
#   DRY_RUN=1 bash scripts/eval_lmms.sh \
#       outputs/sayo_qwen3vl_8b/RUN/checkpoints/global_step_200/actor sayo
#   bash scripts/eval_lmms.sh .sayo/policy-NAME scenes --data .sayo/scenes-NAME
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
source "$ROOT/scripts/lib.sh"
help_or_go_on "$@"
dry_run || true # refuses another value

for python in python3.11 python3 python; do
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
  # The folder of the call stays the current one: relative paths are the user's.
  PYTHONPATH="$ROOT" exec "$python" -m sayo_verl.evaluation.run "$@"
done
refuse E09 "no Python 3.11 on PATH" PATH "install Python 3.11 with venv and pip, or put its folder on PATH"
