"""vLLM worker extension for CPU, selected by ``rollout.engine_kwargs.vllm.worker_extension_cls``.

After loading, vLLM's CPU backend repacks every Linear into a oneDNN handle and drops the weight Parameter. verl's
in-place weight reload then fails ("'Parameter' object has no attribute 'weight_loader'"). Without the packing, vLLM
calls F.linear on the Parameter itself and verl's reload works unchanged.

On a CPU with AMX it also packs the convolution of linear attention (Qwen3.5) in place, and the reload fails on the
changed shape ("expand(torch.FloatTensor{[128, 1, 4]}, size=[128, 4])"). Without AMX the weight keeps its shape.
"""

import torch
import vllm._custom_ops as custom_ops

custom_ops._supports_onednn = False
torch.cpu._is_amx_tile_supported = lambda: False

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension  # noqa: E402


class CPUColocateWorkerExtension(vLLMColocateWorkerExtension):
    """verl's own extension in a process without oneDNN packing."""
