"""What this plug-in expects of verl, checked against the installed verl: sources by hash, seams by behaviour.

A hash that differs is not an error of verl; it says which function to read again before trusting it. After reading:
``bash scripts/contract.sh VERSION --record`` writes the record of a version.
"""

import functools
import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support.verl_contract import difference, measure, record_of, report

from sayo_verl.hooks import contract as compat

VERL = version("verl")
APPLY = [seam for seam in compat.CONTRACT if seam.applies(VERL)]


@pytest.mark.parametrize("seam", APPLY, ids=lambda seam: seam.path.split(":")[1])
def test_source_is_the_one_that_was_read(seam):
    assert record_of(VERL).exists(), f"verl {VERL} was not recorded; run bash scripts/contract.sh {VERL}"
    recorded = json.loads(record_of(VERL).read_text()).get(seam.path)
    # in this process a replaced name already holds our replacement
    found = (_measured_of_replaced() if seam.use == "replaces" else measure([seam])).get(seam.path)
    assert difference(recorded, found) == "same", (
        f"{seam.path} changed. It is a seam of sayo-verl ({seam.use}: {seam.why}); read it again, then record it"
    )


@functools.cache
def _measured_of_replaced():
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from support.verl_contract import CONTRACT, measure; "
        "print(json.dumps(measure([seam for seam in CONTRACT if seam.use == 'replaces'])))"
    )
    env = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "", "VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_PLATFORM": ""}
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("verl", compat.SUPPORTED_VERL)
def test_each_supported_version_has_a_record_of_the_names_that_it_has(verl):
    assert set(json.loads(record_of(verl).read_text())) == {seam.path for seam in compat.CONTRACT if seam.applies(verl)}


def test_names_of_one_version_only_say_which():
    assert [compat.Seam("", "", "", since="0.9.1").applies(v) for v in ("0.9.0", "0.9.1", "0.10.0.dev0")] == [0, 1, 1]
    assert [compat.Seam("", "", "", until="0.9.0").applies(v) for v in ("0.9.0", "0.9.1")] == [1, 0]


def test_the_report_tells_what_changed_from_what_was_not_read():
    reference = {seam.path: {"source": "a", "signature": "(x)"} for seam in compat.CONTRACT if seam.applies("0.9.1")}
    first, second, third = list(reference)[:3]
    found = reference | {first: {"source": "b", "signature": "(x)"}, second: {"source": "b", "signature": "(x, y)"}}
    del found[third]
    lines, as_recorded = report("0.9.2", found, reference, None)
    assert [line.split()[:2] for line in lines[:3]] == [["!", "source"], ["!", "signature"], ["!", "gone"]]
    assert "overrides: reads trainer.v1.trainer_mode once" in lines[0]
    assert "3 marked '!'" in lines[-1]
    assert not as_recorded
    lines, as_recorded = report("0.9.2", found, reference, found | {third: reference[third]})
    assert [line[0] for line in lines[:3]] == [" ", " ", "!"], "read and recorded, but for the one that is gone"
    assert not as_recorded
    assert report("0.9.1", reference, reference, reference) == (
        [f"verl 0.9.1 beside 0.9.1: {len(reference)} same", "all as recorded in verl-0.9.1.json"],
        True,
    )


def test_an_unknown_verl_is_refused(monkeypatch):
    from sayo_verl.errors import SayoError

    monkeypatch.setattr(compat, "version", lambda name: "0.12.0")
    wanted = (
        r"SAYO-X01: .*got 0\.12\.0.*wanted 0\.9\.0 or 0\.9\.1.*fix: pip install verl==0\.9\.1.*contract\.sh 0\.12\.0"
    )
    with pytest.raises(SayoError, match=wanted):
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
