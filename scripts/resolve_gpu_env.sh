#!/usr/bin/env bash
# Resolves the GPU environment without installing it: does pip still find the
# versions of configs/constraints-gpu.txt?
#
#   bash scripts/resolve_gpu_env.sh
#       resolve '.[gpu,dev,anchor,math]' under the constraints, compare
#   bash scripts/resolve_gpu_env.sh --renew
#       resolve it without them, and write the result into the file
#
# Needs python3.11 with pip on Linux x86_64, no GPU, and the package index that
# pip is configured with. pip reads the metadata of each package, or the part of
# the wheel that holds it (fast-deps). Whole downloads are counted.
set -euo pipefail
unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
help_or_go_on "$@"
CONSTRAINTS=configs/constraints-gpu.txt

die() { # what, fix
  printf 'SAYO-X97: %s | at scripts/resolve_gpu_env.sh | fix: %s\n' "$1" "$2" >&2
  exit 1
}

RENEW=no
for argument; do
  [[ "$argument" == --renew ]] || die "unknown argument '$argument'" "give --renew or nothing"
  RENEW=yes
done

[[ "$(uname -sm)" == "Linux x86_64" ]] ||
  die "the constraints are for Linux x86_64, this is $(uname -sm)" "run it on such a machine"
command -v python3.11 >/dev/null ||
  die "no python3.11 on PATH" "install Python 3.11 with pip, or put its folder on PATH"

TMP="$(mktemp -d)"
trap 'rm -rf "$TMP"' EXIT
# The pinned pip: older ones download wheels whole, even for a dry run.
python3.11 -m pip install --quiet --target "$TMP/pip" "$(grep '^pip==' "$CONSTRAINTS")" >"$TMP/log" 2>&1 ||
  { tail -n 20 "$TMP/log" >&2 && die "pip could not be installed" "look at the lines above (network?)"; }
if [[ "$RENEW" == yes ]]; then : >"$TMP/constraints"; else cp "$CONSTRAINTS" "$TMP/constraints"; fi
PYTHONPATH="$TMP/pip" python3.11 -m pip install --dry-run --ignore-installed --no-cache-dir --use-feature=fast-deps \
  --report "$TMP/report.json" --constraint "$TMP/constraints" '.[gpu,dev,anchor,math]' >"$TMP/log" 2>&1 ||
  { tail -n 20 "$TMP/log" >&2 && die "pip finds no set of packages" "look at the lines above; --renew writes a new file"; }
python3.11 - "$TMP" "$CONSTRAINTS" "$RENEW" "$SECONDS" <<'PY'
import json, re, sys
from pathlib import Path

folder, file, renew, seconds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "yes", sys.argv[4]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


lines = file.read_text().splitlines()
kept = {normal(line.partition("==")[0]): line for line in lines if re.match(r"[\w.-]+==", line)}
found = {}
for package in json.loads((folder / "report.json").read_text())["install"]:
    about = package["metadata"]
    if normal(about["name"]) != "sayo-verl":
        found[normal(about["name"])] = f"{about['name']}=={about['version'].partition('+')[0]}"
print(f"resolved {len(found)} packages for Python 3.11 in {seconds} s; nothing was installed")
whole = re.findall(r"Downloading \S+(?<!\.metadata) \(([\d.]+) (kB|MB|GB)\)", (folder / "log").read_text())
size = sum(float(n) * {"kB": 1e-3, "MB": 1, "GB": 1e3}[unit] for n, unit in whole)
print(f"downloaded whole: {len(whole)} archives, {size:.1f} MB; of the others the metadata")
# These are not in a resolution: pip itself, and flash-attn, whose metadata needs torch to be installed.
beside = {"pip", "flash-attn"}
if renew:
    head = [line for line in lines if line.startswith("#")]
    pins = found | {name: kept[name] for name in beside}
    file.write_text("\n".join(head + [pins[name] for name in sorted(pins)]) + "\n")
    print(f"wrote {file}: {len(pins)} lines, {sum(kept.get(n) != line for n, line in pins.items())} of them new")
    sys.exit()
wrong = [f"{line} (constrained to {kept.get(name, 'nothing')})"
         for name, line in found.items() if kept.get(name, "").lower() != line.lower()]  # fmt: skip
wrong += [f"nothing (the file has {kept[name]})" for name in sorted(set(kept) - set(found) - beside)]
if wrong:
    sys.exit(f"SAYO-X98: the constraints are not the resolved set | at {file} | got {'; '.join(wrong)} | "
             "fix: bash scripts/resolve_gpu_env.sh --renew")  # fmt: skip
print(f"every one equals its line in {file}; not compared: {', '.join(kept[name] for name in sorted(beside))}")
PY
