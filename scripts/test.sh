#!/usr/bin/env bash
# Everything a change has to pass: the environment, the linter, the formatter, the
# types, the tests. Stops at the first that fails, so that the last line of a good
# run is pytest's own. Arguments go to pytest: bash scripts/test.sh -k probe
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
help_or_go_on "$@"

enter_environment cpu # tests start commands by name

printf '== ruff check\n'
ruff check .
printf '== ruff format\n'
ruff format --check .
printf '== mypy\n'
mypy

# Tests need no network: a model or data set that is not there is an error at once, not a slow download.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=offline
# Nothing calls home.
export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# Models here are tiny and a run is several processes: with more than one thread each they only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
printf '== pytest\n'
exec python -m pytest -q "$@"
