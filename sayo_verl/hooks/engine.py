"""Registers the engine with the attention mixin. verl imports this module in every worker, before it builds engines,
because the launcher sets ``actor_rollout_ref.model.external_lib=sayo_verl.hooks.engine``.

The registry looks up (device, vendor) before the bare device under which verl registers its own engine, so naming
vendors takes precedence without touching verl. The CPU platform looks up its engines as ``cuda`` (verl's own knob
``VERL_ENGINE_DEVICE``, which selects nothing but this class).
"""

from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from sayo_verl.hooks.capture import AttentionStatisticsMixin


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor=["nvidia", "amd", "cpu"]
)
class SayoFSDPEngine(AttentionStatisticsMixin, FSDPEngineWithLMHead):
    """verl's FSDP engine; identical to it in every call that carries no probe request."""
