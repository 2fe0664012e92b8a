"""What a run would overwrite or resume: each refusal with its case, and what passes."""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from support.launch_config import composed
from support.saved import STATES, save

from sayo_verl.errors import SayoError
from sayo_verl.launch.checkpoints import TRACKER
from sayo_verl.launch.resume import check_metrics, check_resume, describe_checkpoints, how_to_resume

CONTENTS = "actor_rollout_ref.actor.checkpoint"
FOLDER = "trainer.default_local_dir"


@pytest.fixture(scope="module")
def base(repo: Path) -> DictConfig:
    return composed(repo, "+hardware=cpu")


@pytest.fixture
def make(base: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    for name in ("VERL_FILE_LOGGER_PATH", "VERL_FILE_LOGGER_ROOT", "SAYO_RESUME_COMMAND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def changed(**values: Any) -> DictConfig:
        config = copy.deepcopy(base)
        for key, value in ({FOLDER: "checkpoints", "trainer.total_training_steps": 12} | values).items():
            OmegaConf.update(config, key, value)
        return config

    return changed


def refused(config: DictConfig, code: str) -> SayoError:
    with pytest.raises(SayoError) as caught:
        check_resume(config)
    assert caught.value.code == code, str(caught.value)
    return caught.value


# ------------------------------------------------------------------------------------------------------------- metrics


def test_a_used_metrics_file_is_refused(make, tmp_path, monkeypatch):
    metrics = tmp_path / "metrics.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(metrics))
    check_metrics(make())
    metrics.touch()
    check_metrics(make())  # empty: nothing is lost
    metrics.write_text('{"step": 1, "data": {}}\n')
    with pytest.raises(SayoError, match=r"SAYO-L15: .*metrics-2\.jsonl") as caught:
        check_metrics(make())
    assert (caught.value.where, caught.value.got) == ("VERL_FILE_LOGGER_PATH", metrics)
    check_metrics(make(**{"trainer.logger": ["console"]}))  # nothing is written


@pytest.mark.parametrize("logger", ["file", ["console", "file"]])
def test_a_used_metrics_file_at_verls_default_path_is_refused(make, tmp_path, monkeypatch, logger):
    from verl.utils.tracking import FileLogger

    config = make(**{"trainer.logger": logger, "trainer.experiment_name": "mine"})
    check_metrics(config)
    FileLogger("sayo-verl", "mine").log({"x": 1}, 1)
    with pytest.raises(SayoError, match="SAYO-L15") as caught:
        check_metrics(config)
    assert caught.value.got == Path("sayo-verl/mine.jsonl")
    monkeypatch.setenv("VERL_FILE_LOGGER_ROOT", str(tmp_path / "elsewhere"))
    check_metrics(config)
    FileLogger("sayo-verl", "mine").log({"x": 1}, 1)
    with pytest.raises(SayoError, match="elsewhere"):
        check_metrics(config)


# -------------------------------------------------------------------------------------------------------- what passes


@pytest.mark.parametrize("mode", ["disable", "auto"])
@pytest.mark.parametrize("there", [False, True])
def test_an_absent_or_empty_folder_is_a_new_run(make, tmp_path, mode, there):
    if there:
        (tmp_path / "checkpoints").mkdir()
    assert check_resume(make(**{"trainer.resume_mode": mode})) == "no: a new run"


@pytest.mark.parametrize("world", [1, 4])
def test_the_checkpoint_that_the_tracker_names_is_resumed(make, tmp_path, world):
    save(tmp_path / "checkpoints", 2, 10, tracker="10\n", world=world)
    config = make(**{"trainer.n_gpus_per_node": 2 if world == 4 else 1, "trainer.nnodes": 2 if world == 4 else 1})
    assert check_resume(config) == "global_step_10 of 12, from checkpoints"


def test_a_named_checkpoint_is_resumed_into_its_own_or_a_fresh_folder(make, tmp_path):
    save(tmp_path / "checkpoints", 2, 10, tracker=10)
    path = str(tmp_path / "checkpoints" / "global_step_2")
    named = {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": path}
    assert check_resume(make(**named)).startswith("global_step_2 of 12")
    assert check_resume(make(**named, **{FOLDER: "fresh"})).startswith("global_step_2 of 12")
    (tmp_path / "link").symlink_to(tmp_path / "checkpoints")
    assert check_resume(make(**named, **{FOLDER: "link"})).startswith("global_step_2 of 12")
    through = named | {"trainer.resume_from_path": str(tmp_path / "link" / "global_step_2")}
    assert check_resume(make(**through)).startswith("global_step_2 of 12")
    save(tmp_path / "used", 4)
    assert "global_step_4" in refused(make(**named, **{FOLDER: "used"}), "L16").got


def test_the_files_of_another_strategy_are_verls_to_check(make, tmp_path):
    folder = save(tmp_path / "checkpoints", 2, tracker=2)
    shutil.rmtree(folder / "global_step_2" / "actor")
    config = make(**{"actor_rollout_ref.actor.strategy": "megatron"})
    assert check_resume(config).startswith("global_step_2")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_used_checkpoint_folder_names_the_last_by_number(make, tmp_path):
    (tmp_path / "checkpoints" / "global_step_2_old").mkdir(parents=True)
    fresh = make(**{"trainer.resume_mode": "disable"})
    check_resume(fresh)
    save(tmp_path / "checkpoints", 2, 10, tracker=10)
    error = refused(fresh, "L16")
    assert (error.where, error.got) == (FOLDER, "checkpoints with global_step_10")


@pytest.mark.parametrize(
    ("mode", "path", "message"),
    [
        ("resume", None, "did you mean 'resume_path'?"),
        ("Auto", None, "did you mean 'auto'?"),
        (False, None, "disable, auto, resume_path"),
        ("resume_path", None, "global_step_<n>"),
        ("resume_path", "checkpoints", "global_step_<n>"),
        ("resume_path", "checkpoints/global_step_2/", "no slash at its end"),
        ("resume_path", "checkpoints/global_step_3", "existing folder"),
        ("auto", "checkpoints/global_step_2", "verl ignores the path under resume_mode=auto"),
        ("disable", "checkpoints/global_step_2", "verl ignores the path under resume_mode=disable"),
    ],
)
def test_an_invalid_mode_or_path_is_refused(make, tmp_path, mode, path, message):
    save(tmp_path / "checkpoints", 2, tracker=2)
    assert message in str(refused(make(**{"trainer.resume_mode": mode, "trainer.resume_from_path": path}), "L43"))


@pytest.mark.parametrize("tracker", [None, "", "ten", "7", "-2", "2.0", "global_step_2"])
def test_a_tracker_that_names_no_checkpoint_is_refused(make, tmp_path, tracker):
    folder = save(tmp_path / "checkpoints", 10, 2, tracker=tracker)
    (folder / "global_step_12").mkdir()  # a save that was interrupted
    error = refused(make(), "L44")
    assert error.where == str(Path("checkpoints") / TRACKER)
    assert error.wanted == "the step of a complete checkpoint (2, 10)"
    (folder / TRACKER).write_text("10")
    assert check_resume(make()).startswith("global_step_10")


def test_a_tracker_without_checkpoints_or_with_other_bytes_is_refused(make, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / TRACKER).write_text("5")
    assert "none exists" in str(refused(make(), "L44"))
    (tmp_path / "checkpoints" / TRACKER).write_bytes(b"\xff\xfe5")
    refused(make(), "L44")


def test_a_tracker_that_is_a_folder_is_refused(make, tmp_path):
    folder = save(tmp_path / "checkpoints", 2)
    (folder / TRACKER).mkdir()
    error = refused(make(), "L44")
    assert (error.what, error.got) == ("the tracker cannot be read", "Is a directory")
    assert error.fix.startswith("move that folder away, then write")
    assert how_to_resume(make()) is None


def test_the_command_that_repairs_the_tracker_can_be_pasted(make, tmp_path):
    folder = save(tmp_path / "my run's checkpoints", 2)
    config = make(**{FOLDER: str(folder)})
    command = re.search(r"\((echo -n .*)\); if", refused(config, "L44").fix)[1].replace("<n>", "2")
    subprocess.run(["bash", "-c", command], check=True)
    assert check_resume(config).startswith("global_step_2 of 12")


@pytest.mark.parametrize(("saved", "now"), [(1, 2), (4, 2)])
def test_a_checkpoint_of_another_number_of_devices_is_refused(make, tmp_path, saved, now):
    save(tmp_path / "checkpoints", 2, tracker=2, world=saved)
    error = refused(make(**{"trainer.n_gpus_per_node": now}), "L45")
    assert f"files of {saved} devices" in error.got
    assert error.wanted.startswith(f"{now} ")


@pytest.mark.parametrize("lost", [*(f"actor/{state}_world_size_2_rank_1.pt" for state in STATES), "data.pt"])
def test_an_incomplete_checkpoint_is_refused(make, tmp_path, lost):
    folder = save(tmp_path / "checkpoints", 2, 10, tracker=10, world=2)
    (folder / "global_step_10" / lost).unlink()
    error = refused(make(**{"trainer.n_gpus_per_node": 2}), "L46")
    assert error.got == f"{lost} missing"
    assert "(complete: 2)" in error.fix
    (folder / "global_step_10" / lost).touch()  # a save that was interrupted
    assert refused(make(**{"trainer.n_gpus_per_node": 2}), "L46").got == f"{lost} empty"


def test_a_checkpoint_of_weights_alone_is_refused(make, tmp_path):
    (tmp_path / "checkpoints/global_step_5/actor/huggingface").mkdir(parents=True)
    (tmp_path / "checkpoints" / TRACKER).write_text("5")
    error = refused(make(**{f"{CONTENTS}.save_contents": ["hf_model"]}), "L46")
    assert error.got == "data.pt missing and 3 more"
    assert "actor_rollout_ref.model.path" in error.fix


def test_a_checkpoint_without_its_critic_is_refused(make, tmp_path):
    critic = {"critic.enable": True, "algorithm.adv_estimator": "gae"}
    folder = save(tmp_path / "checkpoints", 2, tracker=2)
    assert "critic/" in refused(make(**critic), "L46").got
    shutil.rmtree(folder)
    save(folder, 2, tracker=2, parts=("actor", "critic"))
    check_resume(make(**critic))


@pytest.mark.parametrize("lost", ["model", "optimizer", "extra"])
@pytest.mark.parametrize("key", ["load_contents", "save_contents"])  # verl's load_contents follow save_contents
def test_contents_that_would_start_anew_are_refused(make, tmp_path, key, lost):
    config = make(**{f"{CONTENTS}.{key}": [name for name in ("model", "optimizer", "extra") if name != lost]})
    check_resume(config)  # a new run loads nothing
    save(tmp_path / "checkpoints", 2, tracker=2)
    error = refused(config, "L47")
    assert error.where == f"{CONTENTS}.load_contents"
    assert f"would not load {lost}:" in error.what
    check_resume(make(**{f"{CONTENTS}.load_contents": ["model", "optimizer", "extra", "hf_model"]}))
    check_resume(make(**{f"{CONTENTS}.load_contents": None}))


def test_a_resume_without_a_step_left_is_refused(make, tmp_path):
    save(tmp_path / "checkpoints", 2, 12, tracker=12)
    error = refused(make(), "L48")
    assert error.wanted == "more than 12"
    check_resume(make(**{"trainer.val_only": True}))
    check_resume(make(**{"trainer.total_training_steps": None}))  # epochs: not known here


@settings(deadline=None)  # the first example imports verl
@given(tracker=st.binary(max_size=12) | st.sampled_from([b"2", b" 10\n", b"+2", b"1_0", b"02", b"1e1", b"-2"]))
def test_what_is_accepted_is_what_verl_finds(base, tmp_path_factory, tracker):
    """Any tracker: verl's own function finds the folder that the plan names, or the run is refused."""
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    folder = save(tmp_path_factory.mktemp("run") / "checkpoints", 2, 10)
    (folder / TRACKER).write_bytes(tracker)
    config = base.copy()
    OmegaConf.update(config, FOLDER, str(folder))
    try:
        found = find_latest_ckpt_path(str(folder))
    except ValueError:
        found = None
    if found is None:
        refused(config, "L44")
    else:
        assert check_resume(config).startswith(f"{Path(found).name} of ?, from {folder}")


# -------------------------------------------------------------------------------------------------------- what is said


def test_the_plan_says_whether_checkpoints_can_be_resumed(make):
    def plan(**values: Any) -> str:
        return describe_checkpoints(make(**values))

    assert "cannot be resumed" in plan(**{"trainer.save_freq": -1})
    assert plan(**{"trainer.save_freq": 5}) == "checkpoints, every 5 steps"
    only = plan(**{"trainer.save_freq": 5, f"{CONTENTS}.save_contents": ["hf_model"]})
    assert only.endswith("these cannot be resumed: save_contents lack model, optimizer, extra")


def test_the_last_line_says_how_to_resume_what_can_be_resumed(make, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    assert how_to_resume(make()) is None
    save(folder, 2, 12)
    assert how_to_resume(make()) is None  # no tracker
    (folder / TRACKER).write_text("2")
    line = how_to_resume(make())
    assert line == (
        f"to resume after step 2: the same command with trainer.default_local_dir={folder} trainer.resume_mode=auto "
        f"and VERL_FILE_LOGGER_PATH={tmp_path}/sayo-verl/<a new metrics*.jsonl>"
    )
    monkeypatch.setenv("SAYO_RESUME_COMMAND", "RESUME=/out bash scripts/run_tiny.sh")
    (folder / TRACKER).write_text("12")
    assert how_to_resume(make()) == (
        "to resume after step 12 (all 12 steps are done: raise trainer.total_training_steps): "
        "RESUME=/out bash scripts/run_tiny.sh"
    )


def test_a_resumed_run_keeps_the_run_card_of_the_first(make, tmp_path, monkeypatch):
    from sayo_verl.launch.run_card import write_run_card

    for name, total in (("metrics.jsonl", 4), ("metrics-2.jsonl", 8)):
        monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / name))
        write_run_card(make(**{"trainer.total_training_steps": total}))
    cards = [json.loads((tmp_path / name).read_text()) for name in ("run.json", "run-2.json")]
    assert [card["total_steps"] for card in cards] == [4, 8]
