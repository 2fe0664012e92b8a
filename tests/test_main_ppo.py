"""The task runner of the launcher."""

import pytest
from omegaconf import OmegaConf

from sayo_verl.errors import SetupError
from sayo_verl.main_ppo import SayoTaskRunner


def test_a_task_runner_that_does_not_know_the_estimator_is_refused():
    config = OmegaConf.create({"sayo": {"modules": []}, "algorithm": {"adv_estimator": "attn_of_a_guest"}})
    runner = object.__new__(SayoTaskRunner.__ray_metadata__.modified_class)
    with pytest.raises(SetupError, match="SAYO-X02: the plug-in was not loaded in the task runner"):
        runner.run(config)
