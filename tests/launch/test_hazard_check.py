"""Settings that verl obeys without a word and that harm a run."""

import importlib.util

import pytest
from omegaconf import DictConfig, open_dict
from support.launch_config import add, refused

from sayo_verl.errors import SayoError
from sayo_verl.launch.hazard_check import (
    CORRECTION,
    DASHBOARD,
    KEEP,
    LOG_PROBS,
    LOGGER,
    TEMPLATE,
    TRUST,
    _wandb_can_start,
    check_hazards,
)
from sayo_verl.launch.preflight import preflight

SAVES = {"trainer.save_freq": 5}
GRPO = {"algorithm.adv_estimator": "grpo"}


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_one_kept_checkpoint_is_refused_because_a_kill_while_saving_leaves_none(make):
    error = refused(make(**SAVES, **{KEEP: 1}), "L76")
    assert (error.where, error.got, error.wanted) == (KEEP, 1, "2 or more checkpoints")
    old = add(make(**SAVES), "trainer.remove_previous_ckpt_in_save", True)
    assert "set trainer.max_actor_ckpt_to_keep=2" in refused(old, "L76").fix
    critic = KEEP.replace("actor", "critic")
    preflight(make(**SAVES, **GRPO, **{critic: 1}))  # there is no critic
    with pytest.raises(SayoError, match=rf"^SAYO-L76: .* \| at {critic} .*fix: set {critic}=2"):
        check_hazards(make(**SAVES, **{"critic.enable": True, critic: 1}), None, here=True)
    preflight(make(**SAVES, **{KEEP: 2}))
    preflight(make(**{KEEP: 1, "trainer.save_freq": -1}))  # saves none


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_dashboard_on_all_addresses_is_refused(make, host):
    def config(address: str, include: bool | None) -> DictConfig:
        with open_dict(made := make(**GRPO)):
            made.ray_kwargs.ray_init.include_dashboard = include
        return add(made, DASHBOARD, address)

    assert "ssh -L 8265" in refused(config(host, None), "X30").fix
    refused(config(host, True), "X30", dry_run=True)
    preflight(config(host, False))
    preflight(config("127.0.0.1", True))
    check_hazards(add(config(host, None), "ray_kwargs.ray_init.address", "10.0.0.1:6379"), None, here=True)


def test_code_of_a_model_is_refused_with_a_method_and_from_the_hub(make):
    assert "no supported family needs it" in str(refused(make(**{TRUST: True}), "X31"))
    hub = {"actor_rollout_ref.model.path": "someone/model", TRUST: True}
    assert "cannot pin its revision" in str(refused(make(**GRPO, **hub), "X31", dry_run=True))
    plan = dict(preflight(make(**GRPO, **{TRUST: True})))
    assert plan["model's code"].startswith("RUNS the .py files of ")
    assert "model's code" not in dict(preflight(make(**GRPO)))


@pytest.mark.parametrize(
    ("key", "value"), [("rollout_is", "token"), ("rollout_rs", "seq_mean_k3"), ("bypass_mode", True)]
)
def test_a_correction_without_the_log_probs_that_it_needs_is_refused(make, key, value):
    config = make(**GRPO, **{f"{CORRECTION}.{key}": value, LOG_PROBS: False})
    assert refused(config, "X32").where == f"{CORRECTION}.{key}"
    preflight(make(**GRPO, **{LOG_PROBS: False}))
    if key == "rollout_is":
        preflight(make(**GRPO, **{f"{CORRECTION}.{key}": value}))


def test_a_path_as_the_chat_template_is_refused(make):
    assert "chat_template.jinja" in refused(make(**{TEMPLATE: "/shared/template.jinja"}), "X33").fix
    check_hazards(make(**{TEMPLATE: "{% for m in messages %}{{ m.content }}{% endfor %}"}), None, here=True)


def test_a_logger_that_cannot_start_is_refused(make, monkeypatch, tmp_path):
    assert "did you mean 'wandb'?" in str(refused(make(**{LOGGER: ["wanbd", "file"]}), "X34", dry_run=True))
    found = importlib.util.find_spec
    missing = {"mlflow"}
    monkeypatch.setattr(
        "sayo_verl.launch.hazard_check.find_spec", lambda name: None if name in missing else (found(name) or True)
    )
    assert refused(make(**{LOGGER: ["mlflow"]}), "X34").fix == "pip install mlflow, or leave mlflow out"
    preflight(make(**{LOGGER: ["mlflow"]}), dry_run=True)  # another machine may have it
    wandb = make(**{LOGGER: ["wandb"]})
    assert "WANDB_MODE=offline" in refused(wandb, "X34").fix
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    preflight(wandb)
    (tmp_path / "netrc").write_text("machine")  # damaged
    refused(wandb, "X34")
    monkeypatch.setenv("WANDB_MODE", "offline")
    preflight(wandb)


def test_weights_and_biases_may_be_set_up_in_other_ways_than_by_a_key(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine my.host login user password key\n")
    alone = {"NETRC": str(netrc), "WANDB_CONFIG_DIR": str(tmp_path / "own")}
    assert not _wandb_can_start(alone)
    assert _wandb_can_start({**alone, "WANDB_BASE_URL": "https://my.host:8080"})
    assert _wandb_can_start({**alone, "WANDB_IDENTITY_TOKEN_FILE": "/token"})
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "settings").write_text("[default]\nbase_url = https://my.host\n")
    assert _wandb_can_start(alone)
    netrc.unlink()
    assert not _wandb_can_start(alone)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert _wandb_can_start(alone)


@pytest.mark.parametrize("key", ["trainer.total_epochs", "trainer.total_training_steps"])
def test_a_run_without_a_step_is_refused(make, key):
    assert refused(make(**{key: 0}), "X35").where == key
    preflight(make(**{key: 1}))


def test_full_determinism_is_refused_because_all_responses_of_a_prompt_would_be_equal(make):
    assert (
        "sayo.repeatable_rollouts" in refused(make(**{"actor_rollout_ref.rollout.full_determinism": True}), "X36").fix
    )
