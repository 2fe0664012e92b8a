"""A configuration that passes all checks, to be changed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from support.launch_config import ROWS, composed, write_model, write_rows


@pytest.fixture(scope="module")
def base(repo: Path) -> DictConfig:
    return composed(repo, "+hardware=cpu", "actor_rollout_ref.rollout.n=4")


@pytest.fixture
def make(base: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """``make(**{key: value})``: a configuration that passes, with some keys changed; unknown keys are an error."""
    for name in ("RAY_ADDRESS", "VERL_FILE_LOGGER_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    good = {
        "actor_rollout_ref.model.path": str(
            write_model(tmp_path / "model", model_type="qwen3_vl", text_config={"num_hidden_layers": 4})
        ),
        "data.train_files": str(write_rows(tmp_path / "train.parquet", boxes=[[[0.0, 0.0, 0.5, 0.5]]])),
        "data.val_files": str(write_rows(tmp_path / "val.parquet", boxes=[[[0.5, 0.5, 1.0, 1.0]]])),
        "reward.custom_reward_function.path": "pkg://sayo_verl.reward",
        "trainer.default_local_dir": str(tmp_path / "checkpoints"),
        "data.train_batch_size": ROWS,
        "actor_rollout_ref.actor.ppo_mini_batch_size": ROWS,
        "sayo.preflight_prompts": 0,  # the folder of the model holds no processor
    }

    def changed(**values: Any) -> DictConfig:
        config = copy.deepcopy(base)
        for key, value in (good | values).items():
            OmegaConf.update(config, key, value)
        return config

    return changed
