"""vLLM worker extension for CPU, selected by ``rollout.engine_kwargs.vllm.worker_extension_cls``.

After loading, vLLM's CPU backend repacks every Linear into a oneDNN handle and drops the weight Parameter. verl's
in-place weight reload then fails ("'Parameter' object has no attribute 'weight_loader'"). Without the packing, vLLM
calls F.linear on the Parameter itself and verl's reload works unchanged.
"""

import vllm._custom_ops as custom_ops

custom_ops._supports_onednn = False

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension  # noqa: E402


class CPUColocateWorkerExtension(vLLMColocateWorkerExtension):
    """verl's own extension in a process without oneDNN packing."""
