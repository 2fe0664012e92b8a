"""What the scripts must not do: open a port to everybody, or run a value as a command."""

import subprocess
from pathlib import Path

import pytest
from support.launching import launch

# Places that may listen on all addresses, and why.
ALL_ADDRESSES = {
    "scripts/cluster/kuberay.yaml: dashboard-host: 0.0.0.0": "KubeRay's operator submits the job from another pod"
}
INJECTED = "a b; $(touch {file}) `touch {file}` ' \" \\"


def open_to_all(root: Path) -> set[str]:
    """Lines of scripts and configurations that name all addresses, or show Ray's dashboard."""
    files = [*root.glob("scripts/**/*.sh"), *root.glob("scripts/**/*.yaml"), *root.glob("configs/**/*.yaml")]
    return {
        f"{file.relative_to(root)}: {line.strip()}"
        for file in files
        for line in file.read_text().splitlines()
        if "0.0.0.0" in line or ("--include-dashboard" in line and "=false" not in line)
    }


def test_no_script_listens_on_all_addresses(repo):
    assert open_to_all(repo) == ALL_ADDRESSES.keys()


@pytest.mark.parametrize("line", ["ray start --head --dashboard-host=0.0.0.0", "ray start --include-dashboard=true"])
def test_a_script_that_does_is_found(tmp_path, line):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "run.sh").write_text(f"{line}\n")
    assert open_to_all(tmp_path) == {f"scripts/run.sh: {line}"}


@pytest.mark.parametrize("name", ["METHOD", "DATA", "OUT", "RESUME", "MODEL_PATH", "NNODES", "JOB", "DRY_RUN"])
def test_a_value_of_a_variable_is_never_run_as_a_command(repo, environment, tmp_path, name):
    value = INJECTED.format(file=tmp_path / "touched")
    (tmp_path / "python3").write_text("#!/bin/bash\n[[ $1 == -c ]] || printf '%s\\0' \"$@\"\n")
    (tmp_path / "python3").chmod(0o755)
    given = {**environment, "DRY_RUN": "1", "JOB": "tiny", "METHOD": "grpo", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    if name == "RESUME":
        given["OUT"] = ""
    done = launch(repo, "run.sh", given | {name: value}, f"a={value}")
    assert not (tmp_path / "touched").exists()
    assert done.stdout.endswith(f"\0a={value}\0") if name != "DRY_RUN" else "SAYO-L30" in done.stderr


def test_the_printed_command_is_safe_to_paste(repo, environment, tmp_path):
    """The shell reads back what `place_run` prints: the same words, and nothing is run."""
    value = INJECTED.format(file=tmp_path / "touched")
    code = 'ROOT=/; source scripts/lib.sh; JOB=tiny place_run "$1"; echo "$SAYO_RESUME_COMMAND"'
    given = {**environment, "METHOD": value, "DATA": value, "OUT": f"/{value}", "JOB": "tiny"}
    made = subprocess.run(["bash", "-c", code, "run_x.sh", value], env=given, capture_output=True, text=True, cwd=repo)
    assert made.returncode == 0, made.stderr
    bash = 'bash() { printf \'%s\\n\' "$RESUME" "$METHOD" "$DATA" "${@:2}"; }; '
    read = subprocess.run(["bash", "-c", bash + made.stdout], env=environment, capture_output=True, text=True)
    assert read.stdout.splitlines() == [f"/{value}", value, value, value], read.stderr
    assert not (tmp_path / "touched").exists()
