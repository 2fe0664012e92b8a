#!/usr/bin/env bash
# Says what another version of verl changes of the names that sayo-verl uses, and
# whether that version is supported.
#
#   bash scripts/contract.sh VERSION
#       a release, such as 0.9.0; or `main`, from GitHub; or the folder of a clone
#   bash scripts/contract.sh VERSION --record
#       write tests/hooks/contract/verl-VERSION.json, after the changes were read
#
# The active Python environment is the base: sayo-verl's, with any supported verl.
# It stays as it is. .contract/VERSION gets an environment that sees the base's
# packages, with that verl and those of its dependencies that differ. Exits with 0
# if all names are as recorded for that version (without a record: as in the
# newest supported version), else with 1. `rm -r .contract` removes all of it.
set -euo pipefail

CALLER=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
help_or_go_on "$@"
MAIN=https://github.com/verl-project/verl

[[ $# -ge 1 && $# -le 2 && "${2:---record}" == --record ]] ||
  refuse X07 "wrong arguments" "scripts/contract.sh $*" "bash scripts/contract.sh VERSION [--record]"
usage() {
  refuse X07 "$1" "scripts/contract.sh $VERSION" "name a release such as 0.9.0, or main, or the folder of a clone of verl"
}
VERSION=$1 NAME=$1 WANTED="verl==$1"
FOLDER="$(cd "$CALLER" && [[ -d "$VERSION" ]] && cd -- "$VERSION" && pwd -P)" || FOLDER=''
if [[ "$VERSION" != main && -n "$FOLDER" ]]; then
  WANTED=$FOLDER NAME=${FOLDER##*/}
  grep -qsE "^ *name *= *[\"']verl[\"']" "$FOLDER/pyproject.toml" "$FOLDER/setup.py" ||
    usage "this folder is not a clone of verl ($FOLDER)"
fi
case "$NAME" in '' | . | .. | */*) usage "no folder and no version of this name" ;; esac # .contract/NAME is emptied
BASE="$(python -c 'import importlib.util as u, sysconfig; assert u.find_spec("verl"); print(sysconfig.get_path("purelib"))' \
  2>/dev/null)" || refuse X07 "python has no verl" "$(command -v python || echo PATH)" "source .venv/bin/activate"
if [[ "$VERSION" == main ]]; then
  GIT_TERMINAL_PROMPT=0 timeout 30 git ls-remote -q "$MAIN" HEAD >/dev/null 2>&1 ||
    refuse X08 "verl's main branch is not reachable" "$MAIN" "name a clone instead: bash scripts/contract.sh FOLDER"
  WANTED="verl @ git+$MAIN@main"
fi

ENVIRONMENT="$PWD/.contract/$NAME" LOG="$PWD/.contract/$NAME.log"
PY="$ENVIRONMENT/bin/python"
mkdir -p .contract
python -m venv --clear "$ENVIRONMENT"
# this checkout first; addsitedir also reads the base's own .pth files
printf '%s\nimport site; site.addsitedir("%s")\n' \
  "$PWD" "$BASE" >"$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
unset PYTHONPATH
"$PY" -m pip install --no-input --disable-pip-version-check --no-compile "$WANTED" >"$LOG" 2>&1 ||
  refuse X08 "pip did not install $WANTED" "$LOG" "read the last lines of that file: $(tail -n 1 "$LOG")"
grep '^Successfully installed' "$LOG"
# nothing of sayo-verl may replace a name of verl while names are read
PYTHONPATH="$PWD/tests" VERL_USE_EXTERNAL_MODULES='' VERL_USE_EXTERNAL_PLUGINS=none VERL_PLATFORM='' \
  "$PY" -W ignore -m support.verl_contract "${@:2}" 2>>"$LOG" | grep -v ' \[importing.py:'
