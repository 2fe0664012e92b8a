"""Launch scripts as a user calls them, in an environment of a machine without a card."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

# Answers that the packages are installed, and writes down what a script would start: its arguments, then its variables.
RECORDER = """#!/usr/bin/env bash
[[ "$1" != -c ]] || exit 0
printf '%s\\0' "$@" > "$RECORD.arguments"
env -0 > "$RECORD.variables"
"""


def launch(repo, script, environment, *overrides, **variables):
    """The script in a process of its own."""
    return subprocess.run(
        ["bash", str(repo / "scripts" / script), *overrides],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
        cwd=repo,
    )


def plan(repo, script, environment, *overrides, **variables):
    """A dry run of the script, unless DRY_RUN says otherwise.

    Its Python part runs in this process, which saves the seconds that verl takes to import.
    """
    out = Path(environment["OUT"])
    recorder = out.with_name("recorder")
    recorder.mkdir(exist_ok=True)
    (recorder / "python3").write_text(RECORDER)
    (recorder / "python3").chmod(0o755)
    record = recorder / "call"
    path = f"{recorder}:{environment['PATH']}"
    done = launch(
        repo, script, {**environment, "PATH": path, "RECORD": str(record), "DRY_RUN": "1"}, *overrides, **variables
    )
    if done.returncode != 0:
        return done
    flag, module, *arguments = record.with_suffix(".arguments").read_text().split("\0")[:-1]
    assert flag == "-m"
    exported = dict(line.split("=", 1) for line in record.with_suffix(".variables").read_text().split("\0")[:-1])
    return run_module(module, arguments, exported, repo)


def run_module(module, arguments, variables, folder):
    """``python -m module arguments`` in this process, with its variables, folder and output."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    here = os.getcwd()
    with (
        mock.patch.dict(os.environ, variables, clear=True),
        mock.patch.object(sys, "argv", [module, *arguments]),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            os.chdir(folder)
            warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported before
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                err.write(f"{end.code}\n")
        finally:
            os.chdir(here)
    return CompletedProcess([module, *arguments], code, out.getvalue(), err.getvalue())
