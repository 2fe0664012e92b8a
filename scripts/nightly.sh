#!/usr/bin/env bash
# What takes too long for each change: tests marked `nightly`, then the whole
# scoreboard (docs/trust.md): all tests that its figures name, ten times the cases
# of each property test, mutants, the other versions of verl, licences,
# advisories. One to two hours on two cores. A part that fails does not stop the
# next one; the last line names those that failed.
#
#   bash scripts/nightly.sh                       all
#   TRUST_FUZZ_FACTOR=50 TRUST_MUTANTS=1000 bash scripts/nightly.sh
#
# mutmut and pip-audit are installed in .nightly, an environment beside the
# project's; `rm -r .nightly` removes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
help_or_go_on "$@"

enter_environment cpu
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false TRUST_FUZZ_FACTOR="${TRUST_FUZZ_FACTOR:-10}"
failed=()

echo "== tests marked nightly"
python -m pytest -q -n 0 -m nightly || failed+=("pytest -m nightly")

echo "== tools"
BASE=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python -m venv --clear .nightly
# this checkout first; addsitedir also reads the base's own .pth files
printf '%s\nimport site; site.addsitedir("%s")\n' \
  "$PWD" "$BASE" >"$(.nightly/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
.nightly/bin/python -m pip install --quiet --no-input --disable-pip-version-check mutmut==3.8.1 pip-audit ||
  failed+=("the tools: mutation score and audit are not measured")

echo "== scoreboard"
.nightly/bin/python benchmarks/trust.py || failed+=("benchmarks/trust.py")

((${#failed[@]} == 0)) || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
echo "nothing failed; the figures: docs/trust.md"
