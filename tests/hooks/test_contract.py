"""What this plug-in expects of verl, checked against the installed verl: sources by hash, seams by behaviour.

A hash that differs is not an error of verl; it says which function to read again before trusting it. After reading:
``python tests/hooks/test_contract.py`` writes the new hashes.
"""

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sayo_verl.hooks import contract as compat

RECORD = Path(__file__).parent / "contract" / "verl-0.9.1.json"


@pytest.mark.parametrize("seam", compat.CONTRACT, ids=lambda seam: seam.path.split(":")[1])
def test_source_is_the_one_that_was_read(seam):
    recorded = json.loads(RECORD.read_text())
    assert seam.path in recorded, f"{seam.path} has no recorded source; run python {Path(__file__).name}"
    # in this process a replaced name already holds our replacement
    found = _hashes_of_replaced()[seam.path] if seam.use == "replaces" else seam.source_hash()
    assert found == recorded[seam.path], (
        f"{seam.path} changed. It is a seam of sayo-verl ({seam.use}: {seam.why}); read it again, then record the hash"
    )


@functools.cache
def _hashes_of_replaced():
    return _hashes_in_a_clean_process([seam.path for seam in compat.CONTRACT if seam.use == "replaces"])


def _hashes_in_a_clean_process(paths):
    code = (
        "import json, sys; from sayo_verl.hooks.contract import Seam; "
        f"print(json.dumps({{path: Seam(path, '', '').source_hash() for path in {list(paths)!r}}}))"
    )
    env = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "", "VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_PLATFORM": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_record_has_no_stale_seams():
    assert set(json.loads(RECORD.read_text())) == {seam.path for seam in compat.CONTRACT}


def test_an_unknown_verl_is_refused(monkeypatch):
    from sayo_verl.errors import SayoError

    monkeypatch.setattr(compat, "version", lambda name: "0.12.0")
    with pytest.raises(SayoError, match=r"SAYO-X01: .*got 0\.12\.0.*wanted 0\.9\.1.*fix: pip install verl==0\.9\.1"):
        compat.require_supported_verl()
    monkeypatch.setenv("SAYO_ALLOW_VERL", "0.12.0")
    compat.require_supported_verl()


def test_estimator_gets_these_keywords_and_no_others():
    """The reason for the context: rewards, mask, config and uid are all an estimator is given."""
    import numpy as np
    import torch
    from verl import DataProto
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
    from verl.trainer.ppo.ray_trainer import compute_advantage

    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        return kwargs["token_level_rewards"], kwargs["token_level_rewards"].clone()

    ADV_ESTIMATOR_REGISTRY["contract_spy"] = spy
    try:
        data = DataProto.from_dict(
            {"token_level_rewards": torch.ones(2, 3), "response_mask": torch.ones(2, 3), "extra": torch.ones(2, 3)},
            non_tensors={"uid": np.array(["a", "b"], dtype=object)},
        )
        compute_advantage(data, adv_estimator="contract_spy", config=OmegaConf.create({}))
    finally:
        del ADV_ESTIMATOR_REGISTRY["contract_spy"]
    assert set(seen) == {"token_level_rewards", "response_mask", "config", "index"}


def test_old_log_prob_comes_before_advantage():
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    source = inspect.getsource(PPOTrainer._step_once)
    order = [source.index(call) for call in ("_compute_old_log_prob(", "_compute_ref_log_prob(", "_compute_advantage(")]
    assert order == sorted(order)


def test_trainer_modes_are_compared_by_name():
    """Why the mixin sets the mode back to verl's own name."""
    import verl.trainer.ppo.v1.trainer_base as base

    source = inspect.getsource(base)
    assert 'self.trainer_mode == "sync"' in source or 'self.trainer_mode != "sync"' in source


def test_our_engine_is_selected_by_vendor_and_verls_own_otherwise(monkeypatch):
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    import sayo_verl.hooks.engine as ours

    for vendor in ("nvidia", "amd", "cpu"):
        monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
        monkeypatch.setenv("VERL_ENGINE_VENDOR", vendor)
        for backend in ("fsdp", "fsdp2"):
            assert EngineRegistry.get_engine_cls("language_model", backend) is ours.SayoFSDPEngine
    assert EngineRegistry._engines["language_model"]["fsdp2"]["cuda"] is FSDPEngineWithLMHead
    assert issubclass(ours.SayoFSDPEngine, FSDPEngineWithLMHead)


def test_task_runner_can_be_subclassed_through_its_actor_class():
    from verl.trainer.main_ppo import TaskRunnerV1

    with pytest.raises(TypeError, match=r"[Ii]nherit"):

        class Sub(TaskRunnerV1):
            pass

    assert inspect.isclass(TaskRunnerV1.__ray_actor_class__)


def test_algorithm_config_is_used_as_it_is():
    """Our node algorithm.attn survives only as long as verl does not convert ``algorithm`` into its dataclass."""
    import verl.trainer.ppo.v1.trainer_base as base

    assert "omega_conf_to_dataclass(self.config.algorithm" not in inspect.getsource(base)


def test_a_failing_entry_point_is_swallowed_and_a_failing_module_is_not(tmp_path):
    """Why the launcher names the plug-in in VERL_USE_EXTERNAL_MODULES."""
    (tmp_path / "boom.py").write_text("raise RuntimeError('boom')\n")
    package = tmp_path / "boom-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: boom\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[verl.plugins]\nboom = boom\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "VERL_USE_EXTERNAL_MODULES": ""}
    run = [sys.executable, "-c", "import verl; print('imported')"]
    quiet = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert quiet.returncode == 0
    assert "boom" not in quiet.stdout + quiet.stderr
    loud = subprocess.run(
        run, env={**env, "VERL_USE_EXTERNAL_MODULES": "boom"}, capture_output=True, text=True, check=False
    )
    assert loud.returncode != 0
    assert "boom" in loud.stderr


def test_importing_the_package_imports_neither_torch_nor_verl():
    code = "import sys, sayo_verl; print([m for m in ('torch', 'verl', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_methods_probe_vision_and_data_do_not_import_verl():
    code = (
        "import sys, sayo_verl.methods, sayo_verl.probe.plan, sayo_verl.probe.taps, sayo_verl.vision.masks, "
        "sayo_verl.data.sources.scenes, sayo_verl.data.check, sayo_verl.report.runs; "
        "print([m for m in ('verl', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


if __name__ == "__main__":
    RECORD.parent.mkdir(exist_ok=True)
    hashes = _hashes_in_a_clean_process([seam.path for seam in compat.CONTRACT])
    RECORD.write_text(json.dumps(hashes, indent=1) + "\n")
    print(f"wrote {RECORD}")
