"""Registration of the engine with the attention mixin.

verl imports this module in every worker before it builds engines, because the launcher sets
``actor_rollout_ref.model.external_lib=sayo_verl.hooks.engine``.

The registry looks up (device, vendor) before the device alone, under which verl registers its own engine. An engine
that names vendors therefore takes precedence, and verl stays unchanged. The CPU platform looks up its engines as
``cuda`` through verl's own variable ``VERL_ENGINE_DEVICE``, which selects this class only.
"""

from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from sayo_verl.hooks.capture import AttentionStatisticsMixin


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor=["nvidia", "amd", "cpu"]
)
class SayoFSDPEngine(AttentionStatisticsMixin, FSDPEngineWithLMHead):
    """verl's FSDP engine with the attention mixin; equal to verl's in every call without a request."""
