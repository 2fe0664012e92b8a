"""verl on a machine without an accelerator: a platform for verl's registry and three repairs.

``sayo_verl.plugin`` imports this module only with ``VERL_PLATFORM=cpu``. It lets users try and test the real stack on
any machine; it is not made for speed. Each repair names the line of verl 0.9.1 that needs it.
tests/hooks/test_platform_cpu.py fails when a repair is no longer needed.
"""

import functools
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def _resident_bytes(*_: object) -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def _memory_info(*_: object) -> tuple[int, int]:
    """(available, total) bytes, as ``torch.cuda.mem_get_info``."""
    with open("/proc/meminfo") as f:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in f}
    return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024


def _nothing(*_: object, **__: object) -> None:
    return None


# verl reads these names from get_torch_device(), which is torch.cuda on a GPU platform.
_DEVICE_MODULE = SimpleNamespace(
    is_available=lambda: False,
    set_device=_nothing,
    synchronize=_nothing,
    empty_cache=_nothing,
    ipc_collect=_nothing,
    current_device=lambda: 0,
    device_count=lambda: 1,
    manual_seed=torch.manual_seed,
    manual_seed_all=torch.manual_seed,
    max_memory_allocated=_resident_bytes,
    max_memory_reserved=_resident_bytes,
    memory_allocated=_resident_bytes,
    memory_reserved=_resident_bytes,
    reset_peak_memory_stats=_nothing,
    mem_get_info=_memory_info,
    get_device_name=lambda *_: "CPU",
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """A platform with one logical device.

    Ray gets logical GPUs (``ray.init(num_gpus=...)``), because verl's resource pools and placement groups need them.
    """

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"  # verl uses it as a device and as an index

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False  # verl then sends weights to vLLM through its shared-memory transfer

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def cudart(self) -> None:
        return None

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield


def repair_process_group_backend() -> None:
    """Remove the duplicate device from the backend string of the process group.

    verl/utils/distributed.py:63,89 builds ``cpu:gloo,<device>:<backend>``. On CPU this names cpu twice, and torch
    refuses it ("Duplicate device type cpu in backend string").
    """
    original = torch.distributed.init_process_group

    @functools.wraps(original)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return original("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    torch.distributed.init_process_group = init_process_group


def repair_offload_pinning() -> None:
    """Switch off pinned memory for the offloaded reference model, because pinning needs an accelerator.

    verl/workers/engine/fsdp/transformer_impl.py:462 passes ``CPUOffloadPolicy(pin_memory=True)``. The name is replaced
    in the module from which verl imports it.
    """
    import verl.utils.fsdp_utils as fsdp_utils

    original = fsdp_utils.CPUOffloadPolicy
    fsdp_utils.CPUOffloadPolicy = lambda pin_memory=False: original(pin_memory=False)


def activate() -> None:
    """Make this process a CPU process of verl. The plug-in calls it once."""
    # verl registers its FSDP engines for cuda and npu only; this variable selects the engine class and nothing else.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    repair_process_group_backend()
    repair_offload_pinning()
