"""Batches, Ray, nodes and devices: what a run needs of its machines."""

import copy
import os
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from support.launch_config import refused

from sayo_verl.errors import SayoError
from sayo_verl.launch.preflight import preflight
from sayo_verl.launch.resources import CPUS_FIXED, CPUS_PER_DEVICE, check_devices, check_paths, describe_machines

LOG_PROB_MICRO = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"


@pytest.mark.parametrize(
    ("key", "dynamic"),
    [
        ("rollout.log_prob_micro_batch_size_per_gpu", "rollout.log_prob_use_dynamic_bsz"),
        ("actor.ppo_micro_batch_size_per_gpu", "actor.use_dynamic_bsz"),
    ],
)
def test_micro_batches_that_do_not_divide_the_batch_are_refused(make, key, dynamic):
    key, dynamic = f"actor_rollout_ref.{key}", f"actor_rollout_ref.{dynamic}"
    rows = {"data.train_batch_size": 8, "actor_rollout_ref.actor.ppo_mini_batch_size": 8}  # x 4 responses
    error = refused(make(**rows, **{key: 5}), "L22")
    assert error.where == key
    assert "32 rows" in str(error)
    preflight(make(**rows, **{key: 5, dynamic: True}))
    preflight(make(**rows, **{key: 8}))


def test_the_update_counts_the_rows_of_a_mini_batch(make):
    rows = {"data.train_batch_size": 8, "actor_rollout_ref.actor.ppo_mini_batch_size": 2}  # 32 rows, 8 a mini-batch
    micro = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    assert "8 rows (actor.ppo_mini_batch_size x rollout.n)" in str(refused(make(**rows, **{micro: 16}), "L22"))
    preflight(make(**rows, **{micro: 4}))
    # the log-prob pass sees the batch padded to whole mini-batches: 3 prompts x 4 become 16 rows
    preflight(make(**{**rows, "data.train_batch_size": 3}, **{LOG_PROB_MICRO: 16, micro: 4}))


def test_a_mini_batch_larger_than_the_batch_is_refused(make):
    mini = "actor_rollout_ref.actor.ppo_mini_batch_size"
    error = refused(
        make(**{"data.train_batch_size": 8, mini: 9, "actor_rollout_ref.actor.use_dynamic_bsz": True}), "L22"
    )
    assert (error.where, error.got) == (mini, "9 prompts, of a batch of 8")


def test_too_few_cpus_for_ray_are_refused(make, monkeypatch):
    wanted = 1 + CPUS_PER_DEVICE + CPUS_FIXED  # one storage unit, one device
    error = refused(make(**{"ray_kwargs.ray_init.num_cpus": wanted - 1}), "L14")
    assert error.where == "ray_kwargs.ray_init.num_cpus"
    assert f"num_cpus={wanted}" in error.fix
    refused(make(**{"ray_kwargs.ray_init.num_cpus": wanted - 1, "algorithm.adv_estimator": "grpo"}), "L14")
    preflight(make(**{"ray_kwargs.ray_init.num_cpus": wanted}))
    # another machine will run it
    preflight(make(**{"ray_kwargs.ray_init.num_cpus": wanted - 1}), dry_run=True)
    preflight(make(**{"ray_kwargs.ray_init.num_cpus": wanted - 1, "trainer.nnodes": 2}))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    preflight(make(**{"ray_kwargs.ray_init.num_cpus": wanted - 1}))


def test_without_a_number_of_cpus_those_of_the_machine_count(make, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert refused(make(**{"ray_kwargs.ray_init.num_cpus": None}), "L14").got == 5
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    preflight(make(**{"ray_kwargs.ray_init.num_cpus": None}))


@pytest.mark.parametrize(("key", "number"), [("nnodes", "two"), ("nnodes", 0), ("n_gpus_per_node", True)])
def test_an_invalid_number_of_nodes_or_devices_is_refused(base, key, number):
    config = copy.deepcopy(base)
    OmegaConf.update(config, f"trainer.{key}", number)
    with pytest.raises(SayoError, match=f"L69: not a number .* at trainer.{key}"):
        check_devices(config, dry_run=True)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RAY_ADDRESS", "VERL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sayo_verl.launch.resources.shutil.which", lambda name: None)
    monkeypatch.setattr("sayo_verl.launch.resources.torch.cuda.is_available", lambda: False)
    return monkeypatch


def test_the_plan_names_the_cluster_that_several_nodes_need(base, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert describe_machines(base) == "1 x 1 cpu"
    two = changed(base, "trainer.nnodes", 2)
    assert describe_machines(two) == "2 x 1 cpu, NEEDS RAY_ADDRESS of a Ray cluster that is up"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert describe_machines(two).startswith("2 x 1 cpu of the Ray cluster at 10.0.0.1:6379 (its nodes have their own")


def changed(config: DictConfig, key: str, value: Any) -> DictConfig:
    config = copy.deepcopy(config)
    OmegaConf.update(config, key, value, force_add=True)
    return config


def test_a_gpu_run_on_a_machine_without_a_gpu_is_refused(base, without_gpu):
    base = changed(base, "trainer.device", "cuda")
    with pytest.raises(SayoError, match=r"L21: no GPU .*DRY_RUN=1.*bash scripts/run_sayo_tiny\.sh"):
        check_devices(base, dry_run=False)
    check_devices(base, dry_run=True)
    check_devices(changed(base, "trainer.device", "cpu"), dry_run=False)
    check_devices(changed(base, "ray_kwargs.ray_init.address", "auto"), dry_run=False)
    without_gpu.setenv("RAY_ADDRESS", "auto")
    check_devices(base, dry_run=False)


def test_a_card_is_found_by_its_command(base, without_gpu):
    base = changed(base, "trainer.device", "cuda")
    without_gpu.setattr("sayo_verl.launch.resources.shutil.which", lambda name: "/usr/bin/nvidia-smi")
    check_devices(base, dry_run=False)


def test_several_nodes_without_a_cluster_are_refused(base, without_gpu):
    two = changed(base, "trainer.nnodes", 2)
    with pytest.raises(SayoError, match=r"L55: .* got 2 \| fix: .*RAY_ADDRESS=auto NNODES=2 bash"):
        check_devices(two, dry_run=False)
    check_devices(two, dry_run=True)
    check_devices(changed(two, "ray_kwargs.ray_init.address", "auto"), dry_run=False)
    without_gpu.setenv("RAY_ADDRESS", "auto")
    check_devices(two, dry_run=False)


@pytest.mark.parametrize(
    "key",
    [
        "data.train_files",
        "data.val_files",
        "trainer.default_local_dir",
        "actor_rollout_ref.model.path",
        "reward.custom_reward_function.path",
        "data.custom_cls.path",
    ],
)
def test_relative_paths_on_several_nodes_are_refused(make, tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "b").mkdir(parents=True)
    good = {
        "trainer.nnodes": 2,
        "data.train_files": ["/d/a.parquet", "hdfs://d/b.parquet"],
        "data.val_files": "~/v.parquet",
        "trainer.default_local_dir": "/c",
        "trainer.save_freq": 5,
        "reward.custom_reward_function.path": "pkg://mine",
        "data.custom_cls.path": "/c/mine.py",
    }
    check_paths(make(**good))
    check_paths(make(**good, **{"actor_rollout_ref.model.path": "Qwen/Qwen3-VL-8B-Instruct"}))
    wrong = ["/d/a.parquet", "models/b"] if key == "data.train_files" else "models/b"
    with pytest.raises(SayoError, match=f"L59: .* at {key} .* got models/b.*{os.getcwd()}/models/b"):
        check_paths(make(**{**good, key: wrong}))
    check_paths(make(**{**good, key: wrong, "trainer.nnodes": 1}))


def test_a_relative_checkpoint_folder_is_allowed_if_none_is_saved_or_resumed(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "trainer.nnodes": 2,
        "data.train_files": "/d/a.parquet",
        "data.val_files": "/d/a.parquet",
        "trainer.default_local_dir": "checkpoints",
        "trainer.save_freq": -1,
        "trainer.resume_mode": "auto",
    }
    check_paths(make(**values))
    (tmp_path / "checkpoints").mkdir()  # verl looks for one in there
    with pytest.raises(SayoError, match=r"L59: .* at trainer\.default_local_dir"):
        check_paths(make(**values))
    check_paths(make(**{**values, "trainer.resume_mode": "disable"}))
    with pytest.raises(SayoError, match=r"L59: .* at trainer\.default_local_dir"):
        check_paths(make(**{**values, "trainer.resume_mode": "disable", "trainer.save_freq": 5}))


@pytest.mark.parametrize(
    ("settings", "cards", "got"),
    [
        ({"ray_kwargs.ray_init.num_gpus": 1, "trainer.n_gpus_per_node": 3}, 0, "1 (ray_kwargs.ray_init.num_gpus)"),
        (
            {"trainer.device": "cuda", "ray_kwargs.ray_init.num_gpus": None, "trainer.n_gpus_per_node": 8},
            4,
            "4 (visible",
        ),
        ({"trainer.v1.trainer_mode": "separate_async", "actor_rollout_ref.rollout.nnodes": 1}, 0, "1 (ray_kwargs"),
    ],
)
def test_more_devices_than_the_ray_that_is_started_has_are_refused(base, without_gpu, settings, cards, got):
    without_gpu.setattr("sayo_verl.launch.resources.torch.cuda.is_available", lambda: cards > 0)
    without_gpu.setattr("sayo_verl.launch.resources.torch.cuda.device_count", lambda: cards)
    config = changed(base, "actor_rollout_ref.rollout.n_gpus_per_node", 1)
    for key, value in settings.items():
        config = changed(config, key, value)
    with pytest.raises(SayoError, match="L81: Ray has fewer devices on this machine") as refusal:
        check_devices(config, dry_run=False)
    assert refusal.value.got.startswith(got)
    check_devices(config, dry_run=True)  # of another machine
    check_devices(changed(config, "ray_kwargs.ray_init.address", "10.0.0.1:6379"), dry_run=False)


def test_cards_that_torch_cannot_count_are_left_to_ray(base, without_gpu):
    without_gpu.setattr("sayo_verl.launch.resources.shutil.which", lambda name: "/usr/bin/nvidia-smi")
    without_gpu.setattr("sayo_verl.launch.resources.torch.cuda.device_count", lambda: 0)
    config = changed(changed(base, "trainer.device", "cuda"), "ray_kwargs.ray_init.num_gpus", None)
    check_devices(changed(config, "trainer.n_gpus_per_node", 8), dry_run=False)
