"""vLLM worker extension for CPU, selected by ``rollout.engine_kwargs.vllm.worker_extension_cls``.

vLLM's CPU backend repacks every Linear into a oneDNN handle after loading and drops the weight Parameter, so verl's
in-place weight reload finds nothing to write into ("'Parameter' object has no attribute 'weight_loader'"). With the
packing off, vLLM calls F.linear on the live Parameter and verl's reload works unchanged.
"""

import vllm._custom_ops as custom_ops

custom_ops._supports_onednn = False

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension  # noqa: E402


class CPUColocateWorkerExtension(vLLMColocateWorkerExtension):
    """verl's own extension, in a process where oneDNN packing is off."""
