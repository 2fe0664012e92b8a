"""The CPU platform and the guards: each is still needed by the installed verl and vLLM, and does what it says.

A failure of a ``still_needed`` test is good news: verl fixed it, and the repair can go.
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CLEAN = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "", "VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_PLATFORM": ""}


# What verl and vLLM are in a process: two are started, because importing both takes seconds.
FACTS = """
import json, sys
import torch, verl
from tensordict import TensorDict
from verl.plugin.platform import PlatformRegistry
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name

facts = {"platforms": sorted(PlatformRegistry.registered_names()), "device": get_device_name()}
rows = [torch.arange(4 * 5).view(4, 5) + 100 * i for i in range(3)]
ids = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
data = TensorDict({"position_ids": ids}, batch_size=[3])
tu.maybe_fix_3d_position_ids(data)
try:
    out = tu.index_select_tensor_dict(data, [2, 0])["position_ids"]
    same = all(torch.equal(a, rows[i]) for a, i in zip(out.unbind(), (2, 0)))
    facts["equal lengths"] = ["right" if same else "wrong", int(out.offsets()[-1]), *out.values().shape]
except RuntimeError as error:
    facts["equal lengths"] = ["crash", str(error)]
if sys.argv[1:] == ["all"]:
    import verl.workers.engine.fsdp.transformer_impl
    import vllm._custom_ops as ops
    from verl.workers.engine.base import EngineRegistry
    facts["cpu engine"] = "cpu" in EngineRegistry._engines["language_model"]["fsdp2"]
    facts["onednn"] = bool(ops._supports_onednn)
print(json.dumps(facts))
"""


def facts(*arguments, **env):
    """``FACTS`` of a fresh process, without plug-ins unless ``env`` says otherwise."""
    command = [sys.executable, "-c", FACTS, *arguments]
    done = subprocess.run(command, env=CLEAN | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def stock():
    return facts("all")


@pytest.fixture(scope="module")
def plugged():
    return facts(VERL_USE_EXTERNAL_MODULES="sayo_verl.plugin")


def test_the_platform_is_active_only_when_chosen(plugged):
    from verl.plugin.platform import PlatformRegistry
    from verl.utils.device import get_device_name

    assert os.environ["VERL_PLATFORM"] == "cpu", "chosen in this process, see conftest.py"
    assert "cpu" in PlatformRegistry.registered_names()
    assert get_device_name() == "cpu"
    assert "cpu" not in plugged["platforms"]


def test_verl_has_no_cpu_platform_still_needed(stock):
    assert "cpu" not in stock["platforms"], "verl ships a CPU platform now"


def test_process_group_backend_repair_still_needed():
    with pytest.raises(ValueError, match="Duplicate device type cpu"):
        torch.distributed.distributed_c10d.BackendConfig(torch.distributed.Backend("cpu:gloo,cpu:gloo"))
    import verl.utils.distributed as distributed

    assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in inspect.getsource(distributed)


def test_engine_device_knob_still_needed(stock):
    assert stock["cpu engine"] is False, "verl registers an FSDP engine for cpu now"


def test_offload_pinning_repair_still_needed():
    import verl.workers.engine.fsdp.transformer_impl as engine

    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(engine)
    import verl.utils.fsdp_utils as fsdp_utils

    assert fsdp_utils.CPUOffloadPolicy(pin_memory=True).pin_memory is False, "the repair is not in place"


def test_vllm_repacks_linears_on_cpu_still_needed(stock):
    assert stock["onednn"] is True, "vLLM's CPU build no longer uses oneDNN handles"


def test_vllm_packs_the_convolution_of_linear_attention_still_needed():
    """In place and with another shape, on a CPU with AMX: verl's reload of the weight then fails."""
    source = Path(importlib.util.find_spec("vllm").origin).parent / "model_executor" / "layers" / "utils.py"
    assert "layer.weight.data = ops.causal_conv1d_weight_pack(unpacked)" in source.read_text()


def test_equal_length_mrope_guard_still_needed(stock, plugged):
    """verl issue 7899: four equally long rows come back ragged over the component dimension."""
    assert stock["equal lengths"][0] in ("crash", "wrong"), f"verl fixed issue 7899: {stock['equal lengths']}"
    assert plugged["equal lengths"] == ["right", 10, 4, 10]


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
