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

from sayo_verl.hooks import (
    bad_images,
    filter_limit,
    fingerprint,
    queue_name,
    record_agent,
    redacted_output,
    repeat,
    rollout_errors,
    save_errors,
    sglang,
    skipped_updates,
    step_guard,
)
from sayo_verl.hooks import contract as compat
from sayo_verl.hooks.estimator import register_estimators
from sayo_verl.models import internvl, qwen2_5_vl

compat.require_supported_verl()
if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from sayo_verl.hooks.cpu import platform, polling

    platform.activate()
    wrapt.register_post_import_hook(polling.read_poll_interval, "verl.trainer.ppo.v1.replay_buffer")
wrapt.register_post_import_hook(filter_limit.stop_endless_filtering, "verl.trainer.ppo.v1.replay_buffer")
compat.guard_equal_length_mrope()
# After the import of verl's module, which takes seconds that most processes do not need.
wrapt.register_post_import_hook(compat.guard_weight_socket, compat.WEIGHT_TRANSFER)
wrapt.register_post_import_hook(fingerprint.save_beside_checkpoints, "verl.trainer.ppo.v1.trainer_base")
for of_queue in ("transfer_queue.interface", "transfer_queue.storage.clients.ray_storage_client"):
    wrapt.register_post_import_hook(queue_name.separate_queues, of_queue)
wrapt.register_post_import_hook(compat.guard_saved_weights, "verl.utils.fsdp_utils")
wrapt.register_post_import_hook(sglang.mask_placeholders, "verl.workers.rollout.sglang_rollout.async_sglang_server")
wrapt.register_post_import_hook(rollout_errors.report_rollout_errors, "verl.experimental.agent_loop.agent_loop")
wrapt.register_post_import_hook(step_guard.guard_steps, "verl.trainer.ppo.v1.trainer_base")
wrapt.register_post_import_hook(save_errors.guard_save, "verl.trainer.ppo.v1.trainer_base")
wrapt.register_post_import_hook(step_guard.stop_endless_refill, "verl.trainer.ppo.v1.replay_buffer")
wrapt.register_post_import_hook(bad_images.name_bad_images, "verl.utils.dataset.rl_dataset")
wrapt.register_post_import_hook(skipped_updates.count_skipped_updates, "verl.workers.engine.fsdp.transformer_impl")
wrapt.register_post_import_hook(record_agent.register, "verl.experimental.agent_loop.agent_loop")
wrapt.register_post_import_hook(redacted_output.redact_prints, "verl.trainer.main_ppo")
wrapt.register_post_import_hook(repeat.seed_requests, "verl.experimental.agent_loop.agent_loop")
wrapt.register_post_import_hook(repeat.order_batches, "verl.trainer.ppo.v1.trainer_base")
internvl.activate()
qwen2_5_vl.activate()
register_estimators()
