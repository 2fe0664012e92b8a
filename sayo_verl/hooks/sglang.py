"""Image placeholders in responses, which verl prevents in vLLM and not in SGLang.

A sampled ``<|image_pad|>`` has no image. verl's ``get_vision_placeholder_token_ids`` says how the run then fails.
Not run: there is no SGLang without a GPU.
"""

import functools
from types import ModuleType
from typing import Any

# Added to a logit. It keeps the token out of every response in any floating-point type.
NEVER = -1e4


def mask_placeholders(server: ModuleType) -> None:
    """Give each request of verl's SGLang server a bias against image and video placeholders.

    Args:
        server: ``verl.workers.rollout.sglang_rollout.async_sglang_server``.
    """
    cls: Any = server.SGLangHttpServer
    original = cls.generate

    @functools.wraps(original)
    async def generate(self: Any, prompt_ids: Any, sampling_params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        from verl.workers.rollout.utils import get_vision_placeholder_token_ids

        masked = {str(token): NEVER for token in get_vision_placeholder_token_ids(self.model_config.processor)}
        if masked:
            # a copy: several sessions share the dictionary
            sampling_params = {**sampling_params, "logit_bias": {**(sampling_params.get("logit_bias") or {}), **masked}}
        return await original(self, prompt_ids, sampling_params, *args, **kwargs)

    cls.generate = generate
