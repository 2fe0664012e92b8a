"""The ``sayo`` command as a whole; what a subcommand does is tested in its room."""

import subprocess
import sys

import pytest

from sayo_verl.cli import COMMANDS, main
from sayo_verl.prepare import SOURCES

FOCUS = ["report", "--base", "x", "--after", "y", "--rows", "z", "--out", "o", "--alpha", "2"]


def loaded_after(*argv: str) -> set[str]:
    """Modules that are loaded when this command line was parsed."""
    code = "import sys, sayo_verl.cli as cli; cli.build_parser().parse_args(sys.argv[1:]); print(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True).stdout.split()
    )


def test_a_file_named_as_a_command_does_not_load_that_command():
    loaded = loaded_after("report", "mix", "policy", "prepare", "inspect")
    assert not loaded & {"torch", "pyarrow", "sayo_verl.data.mix", "sayo_verl.inspection.command"}
    assert "sayo_verl.data.mix" in loaded_after("prepare", "mix", "--from=a=all", "--rows=1", "--out=mixed")


def test_checking_focus_loads_no_model_library():
    assert "torch" not in loaded_after("focus", *FOCUS)


def test_the_help_of_look_loads_no_model_library():
    assert not loaded_after("look", "--model", "m") & {"torch", "transformers"}


def test_help_fits_a_screen_and_names_every_command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert len(shown.splitlines()) <= 24
    assert [name for name in COMMANDS if f"\n    {name} " not in shown] == []


def test_help_of_every_subcommand_fits_a_screen_and_the_rest_is_in_help_all(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    prepared = [f"prepare {name}" for name in (*SOURCES, "mix", "synthetic")]
    stages = [f"focus {name}" for name in ("", "run", "train", "respond", "report")]
    commands = ["doctor", "prepare", "inspect", "look", "watch", "report", "compare", "diagnose", "evaluate"]
    for command in [*commands, *prepared, *stages]:
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 30, command
        assert max(map(len, lines)) <= 80, command
        assert command != "prepare gqa" or lines[-1] == "more options: --help-all"
    with pytest.raises(SystemExit):
        main(["prepare", "jsonl", "--help-all"])
    page = capsys.readouterr().out
    assert "--max-drop" in page
    for name in SOURCES:
        with pytest.raises(SystemExit):
            main(["prepare", name, "--help-all"])
        shown = capsys.readouterr().out
        assert [flag for flag in ("--trust-boxes", "--rescale", "--box-frame") if flag not in shown] == [], name
        assert ("--prompt" in shown.partition("rows:")[2]) == (name != "verl"), name
    assert "Unknown keys are refused by name" in page  # the format, from the module


def test_a_command_that_does_not_exist_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "gqaa"])
    assert stop.value.code == 2
    assert "'gqa'" in capsys.readouterr().err


def test_a_missing_option_is_explained_below_a_short_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "jsonl", "--file", "x"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 5
    assert lines[0].startswith("usage: sayo prepare jsonl --file FILE --out FOLDER")
    assert lines[-2] == "sayo prepare jsonl: error: the following arguments are required: --out"
    assert "folder to make" in lines[-1]


@pytest.mark.parametrize("door", [["-m", "sayo_verl.focus"], ["-m", "sayo_verl.cli", "focus"]], ids=["module", "sayo"])
def test_sayo_focus_and_the_module_for_torchrun_are_one_command_line(door):
    done = subprocess.run([sys.executable, *door, *FOCUS, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("SAYO-F05: a setting of the anchoring stage is out of range | at FocusConfig")


def test_the_old_name_of_the_anchoring_stage_names_the_new_one():
    done = subprocess.run(
        [sys.executable, "-m", "sayo_verl.anchoring", "train", "--base", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("SAYO-F25: ")
    assert "sayo focus train|respond|report" in done.stderr
