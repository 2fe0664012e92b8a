"""What is refused before an environment is built."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from support.launch_config import composed

from sayo_verl.data.folder import split_files
from sayo_verl.errors import SayoError
from sayo_verl.launch.names import BY_SCRIPT, UNREAD, refuse_names
from sayo_verl.script_variables import ELSEWHERE


@pytest.mark.parametrize(
    "argument", ["+method=daul", "method=daul", "++method=daul", "+method=dual.yaml", "+method=vgpo"]
)
def test_an_unknown_job_method_or_rl_suggests_the_right_one(repo, argument):
    with pytest.raises(SayoError, match=r"L30: there is no method .*did you mean 'dual'.* wanted .* dual .*region"):
        refuse_names(["--config-dir", str(repo / "configs"), argument], {})
    with pytest.raises(SayoError, match=r"L30: there is no job .*did you mean 'tiny'"):
        refuse_names(["--config-dir", str(repo / "configs"), "+job=tniy"], {})
    with pytest.raises(SayoError, match=r"L30: there is no rl .*did you mean 'dapo'"):
        refuse_names([f"--config-dir={repo / 'configs'}", "+rl=dapoo"], {})
    refuse_names(["--config-dir", str(repo / "configs"), "+job=tiny", "+method=dual"], {})
    refuse_names([argument], {})


@pytest.mark.parametrize("name", [*UNREAD, *ELSEWHERE])
def test_a_variable_that_no_script_reads_is_refused(name):
    with pytest.raises(SayoError, match=f"L67: .* at {name} .* got 7 .* fix: use "):
        refuse_names([], {name: "7", BY_SCRIPT: "RESUME=..."})
    refuse_names([], {name: "7"})
    refuse_names([], {name: "", BY_SCRIPT: "RESUME=..."})


@pytest.mark.parametrize(
    ("name", "meant"), [("NODES", "NNODES"), ("NGPUS", "NGPUS_PER_NODE"), ("GPUS_PER_NODE", "NGPUS_PER_NODE")]
)
def test_another_name_of_a_number_of_nodes_or_devices_is_refused_with_the_right_one(name, meant):
    with pytest.raises(SayoError, match=f"L67: .* at {name} .* use {meant}=N in front of the script, and unset {name}"):
        refuse_names([], {name: "2", BY_SCRIPT: "RESUME=..."})


def test_what_replaces_a_variable_is_a_key_of_the_jobs(repo):
    base = composed(repo, "+job=sayo_qwen3vl_8b", "+method=region")
    for name, replacement in UNREAD.items():
        if replacement.endswith("=") and not replacement.startswith(("+", "METHOD")):
            assert OmegaConf.select(base, replacement[:-1], default="absent") != "absent", name
    with pytest.raises(SayoError, match=r"use actor_rollout_ref\.actor\.optim\.lr=1e-6 after the script, and unset LR"):
        refuse_names([], {"LR": "1e-6", BY_SCRIPT: "RESUME=..."})


def test_a_folder_of_configurations_that_does_not_exist_is_not_taken_for_a_wrong_name():
    with pytest.raises(SayoError, match=r"L30: the folder of configurations does not exist .* got /nothere"):
        refuse_names(["--config-dir", "/nothere", "+job=tiny"], {})


@pytest.mark.parametrize("argument", ["+method='region'", "+rl=[dapo]", "+method=region,grpo"])
def test_hydra_judges_what_is_no_plain_name(repo, argument):
    refuse_names(["--config-dir", str(repo / "configs"), argument], {})
    refuse_names(["--config-dir", str(repo / "configs"), "+rl=mine", "hydra.searchpath=[file:///my]"], {})


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_sweeps_are_refused(flag):
    with pytest.raises(SayoError, match="L74: sweeps are not supported"):
        refuse_names([flag, "data.seed=1,2"], {})


def script(**variables):
    """The environment of a launch script."""
    return {BY_SCRIPT: "RESUME=...", **{name: str(value) for name, value in variables.items()}}


def test_a_folder_that_does_not_exist_is_refused_as_the_launcher_does(tmp_path):
    absent = tmp_path / "absent"
    with pytest.raises(SayoError, match="D56") as early:
        refuse_names([], script(DATA=absent))
    with pytest.raises(SayoError) as late:
        split_files(absent)
    assert str(early.value) == str(late.value)
    refuse_names(["sayo.dry_run=True"], script(DATA=absent))  # the plan says NOT THERE YET
    refuse_names(["+sayo.dry_run=true"], script(DATA=absent))
    with pytest.raises(SayoError, match=f"L44: there is no checkpoint to resume .* at {absent}/checkpoints"):
        refuse_names(["sayo.dry_run=True"], script(RESUME="absent", OUT=absent))
    refuse_names([], script(RESUME=tmp_path, OUT=tmp_path, DATA=tmp_path))
    refuse_names([], script(OUT=absent))  # a new run
    refuse_names([], {"DATA": str(absent), "RESUME": "absent"})  # not of a script


def test_names_are_checked_by_a_python_without_packages(repo):
    command = [sys.executable, "-S", "-m", "sayo_verl.launch.names", "--config-dir", "configs", "+method=daul"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("SAYO-L30: there is no method of this name (did you mean 'dual'?)")


def test_variables_that_systems_set_are_not_refused():
    refuse_names([], script(NAME="host", MODEL_NAME="m", DATA_DIR="/d", OUTPUT_DIR="/o", GPUS="8", REGION="eu"))
