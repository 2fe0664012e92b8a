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
    phases,
    queue_name,
    record_agent,
    redacted_output,
    repeat,
    reward_limit,
    rollout_errors,
    save_errors,
    sglang,
    skipped_updates,
    step_guard,
)
from sayo_verl.hooks import contract as compat
from sayo_verl.hooks.estimator import register_estimators
from sayo_verl.models import internvl, qwen2_5_vl

TRAINER, BUFFER = "verl.trainer.ppo.v1.trainer_base", "verl.trainer.ppo.v1.replay_buffer"
AGENT_LOOP = "verl.experimental.agent_loop.agent_loop"
# (module of verl, what runs after its import). That import takes seconds, which most processes do not need.
GUARDS = (
    # A wait or a loop without an end
    (BUFFER, filter_limit.stop_endless_filtering),
    (BUFFER, step_guard.stop_endless_refill),
    (BUFFER, phases.tell_rollouts),
    (phases.TRAINERS[0], phases.tell_steps),
    *((trainer, phases.tell_timers) for trainer in phases.TRAINERS),
    ("verl.experimental.reward_loop.reward_loop", reward_limit.limit_rewards),
    # What two jobs would share
    (compat.WEIGHT_TRANSFER, compat.guard_weight_socket),
    ("transfer_queue.interface", queue_name.separate_queues),
    ("transfer_queue.storage.clients.ray_storage_client", queue_name.separate_queues),
    # Checkpoints; the guard that names a full disk is outside of the one that writes the fingerprint
    (TRAINER, fingerprint.save_beside_checkpoints),
    (TRAINER, save_errors.guard_save),
    ("verl.utils.fsdp_utils", compat.guard_saved_weights),
    # Errors with their row
    (AGENT_LOOP, rollout_errors.report_rollout_errors),
    (TRAINER, step_guard.guard_steps),
    ("verl.utils.dataset.rl_dataset", bad_images.name_bad_images),
    ("verl.workers.engine.fsdp.transformer_impl", skipped_updates.count_skipped_updates),
    # Rollouts
    ("verl.workers.rollout.sglang_rollout.async_sglang_server", sglang.mask_placeholders),
    (AGENT_LOOP, record_agent.register),
    (AGENT_LOOP, repeat.seed_requests),
    (TRAINER, repeat.order_batches),
    # Prints
    ("verl.trainer.main_ppo", redacted_output.redact_prints),
)

compat.require_supported_verl()
if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from sayo_verl.hooks.cpu import platform, polling

    platform.activate()
    wrapt.register_post_import_hook(polling.read_poll_interval, BUFFER)
for module, guard in GUARDS:
    wrapt.register_post_import_hook(guard, module)
compat.guard_equal_length_mrope()
internvl.activate()
qwen2_5_vl.activate()
register_estimators()
