"""What verl loads in every process (entry point group ``verl.plugins``, and ``VERL_USE_EXTERNAL_MODULES``).

Light on purpose: it runs on every ``import verl``, in vLLM's processes too. It registers the estimators, the
guards of ``sayo_verl.hooks.contract`` and the adapters of other model families. With ``VERL_PLATFORM=cpu`` it
adds the CPU platform. ``sayo_verl.hooks.engine`` registers engines in workers, ``sayo_verl.hooks.modes`` trainers in
the task runner.

verl logs an entry point that raises at DEBUG level and continues. So the launcher also names this module in
``VERL_USE_EXTERNAL_MODULES``, where a failure stops the process.
"""

import os

import wrapt

from sayo_verl.hooks import contract as compat
from sayo_verl.hooks import filter_limit, phases, record_agent, reward_limit, sglang
from sayo_verl.hooks.estimator import register_estimators
from sayo_verl.models import internvl, qwen2_5_vl

compat.require_supported_verl()
if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from sayo_verl.hooks.cpu import platform, polling

    platform.activate()
    wrapt.register_post_import_hook(polling.read_poll_interval, "verl.trainer.ppo.v1.replay_buffer")
wrapt.register_post_import_hook(filter_limit.stop_endless_filtering, "verl.trainer.ppo.v1.replay_buffer")
wrapt.register_post_import_hook(phases.tell_rollouts, "verl.trainer.ppo.v1.replay_buffer")
wrapt.register_post_import_hook(phases.tell_steps, phases.TRAINERS[0])
for trainer in phases.TRAINERS:
    wrapt.register_post_import_hook(phases.tell_timers, trainer)
wrapt.register_post_import_hook(reward_limit.limit_rewards, "verl.experimental.reward_loop.reward_loop")
compat.guard_equal_length_mrope()
# After the import of verl's module, which takes seconds that most processes do not need.
wrapt.register_post_import_hook(compat.guard_weight_socket, compat.WEIGHT_TRANSFER)
wrapt.register_post_import_hook(compat.guard_saved_weights, "verl.utils.fsdp_utils")
wrapt.register_post_import_hook(sglang.mask_placeholders, "verl.workers.rollout.sglang_rollout.async_sglang_server")
wrapt.register_post_import_hook(record_agent.register, "verl.experimental.agent_loop.agent_loop")
internvl.activate()
qwen2_5_vl.activate()
register_estimators()
