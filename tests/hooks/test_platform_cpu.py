"""The CPU platform and the guards: each is still needed by the installed verl and vLLM, and does what it says.

A failure of a ``still_needed`` test is good news: verl fixed it, and the repair can go.
"""

import inspect
import os
import subprocess
import sys

import pytest
import torch

CLEAN = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "", "VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_PLATFORM": ""}


def run(code, env=None):
    """A fresh process, without plug-ins unless ``env`` says otherwise."""
    return subprocess.run([sys.executable, "-c", code], env=env or CLEAN, capture_output=True, text=True, check=False)


def test_the_platform_is_active_only_when_chosen():
    code = (
        "import verl, sys, torch.distributed as d; from verl.plugin.platform import PlatformRegistry as R; "
        "from verl.utils.device import get_device_name; "
        "print('cpu' in R.registered_names(), get_device_name(), d.init_process_group.__module__)"
    )
    plugin = {**CLEAN, "VERL_USE_EXTERNAL_MODULES": "sayo_verl.plugin"}
    chosen, other = run(code, {**plugin, "VERL_PLATFORM": "cpu"}), run(code, plugin)
    assert chosen.stdout.split()[:2] == ["True", "cpu"], chosen.stderr
    assert other.stdout.split()[0] == "False", other.stderr


def test_verl_has_no_cpu_platform_still_needed():
    done = run("import verl; from verl.plugin.platform import PlatformRegistry as R; print(R.registered_names())")
    assert "'cpu'" not in done.stdout, "verl ships a CPU platform now"


def test_process_group_backend_repair_still_needed():
    with pytest.raises(ValueError, match="Duplicate device type cpu"):
        torch.distributed.distributed_c10d.BackendConfig(torch.distributed.Backend("cpu:gloo,cpu:gloo"))
    import verl.utils.distributed as distributed

    assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in inspect.getsource(distributed)


def test_engine_device_knob_still_needed():
    code = (
        "import verl.workers.engine.fsdp.transformer_impl; from verl.workers.engine.base import EngineRegistry as E; "
        "print('cpu' in E._engines['language_model']['fsdp2'])"
    )
    assert run(code).stdout.split()[-1] == "False", "verl registers an FSDP engine for cpu now"


def test_offload_pinning_repair_still_needed():
    import verl.workers.engine.fsdp.transformer_impl as engine

    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(engine)
    import verl.utils.fsdp_utils as fsdp_utils

    assert fsdp_utils.CPUOffloadPolicy(pin_memory=True).pin_memory is False, "the repair is not in place"


def test_vllm_repacks_linears_on_cpu_still_needed():
    done = run("import vllm._custom_ops as ops; print(ops._supports_onednn)")
    assert done.stdout.split()[-1] == "True", "vLLM's CPU build no longer uses oneDNN handles"


def test_equal_length_mrope_guard_still_needed():
    """verl issue 7899: four equally long rows come back ragged over the component dimension."""
    code = """
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
rows = [torch.arange(4 * 5).view(4, 5) + 100 * i for i in range(3)]
ids = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
data = TensorDict({"position_ids": ids}, batch_size=[3])
tu.maybe_fix_3d_position_ids(data)
try:
    out = tu.index_select_tensor_dict(data, [2, 0])["position_ids"]
    same = all(torch.equal(a, rows[i]) for a, i in zip(out.unbind(), (2, 0)))
    print("right" if same else "wrong", int(out.offsets()[-1]), tuple(out.values().shape))
except RuntimeError as error:
    print("crash", error)
"""
    before = run(code)
    assert before.stdout.startswith(("crash", "wrong")), f"verl fixed issue 7899: {before.stdout}"
    after = run(code, {**CLEAN, "VERL_USE_EXTERNAL_MODULES": "sayo_verl.plugin"})
    assert after.stdout.startswith("right 10 (4, 10)"), after.stdout + after.stderr


def test_guard_leaves_ragged_rows_to_verl():
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    rows = [torch.arange(4 * n).view(4, n) for n in (3, 5)]
    ids = tu.nested_tensor_from_tensor_list(rows, ragged_idx=2)
    data = TensorDict({"position_ids": ids}, batch_size=[2])
    tu.maybe_fix_3d_position_ids(data)
    for got, want in zip(data["position_ids"].unbind(), rows, strict=True):
        assert torch.equal(got, want)


def test_memory_queries_are_real():
    from sayo_verl.hooks.cpu.platform import PlatformCPU

    available, total = PlatformCPU.device_module.mem_get_info()
    assert 0 < available <= total
    assert PlatformCPU.device_module.memory_allocated() > 10_000_000
