"""What verl loads in every process (entry point group ``verl.plugins``, and ``VERL_USE_EXTERNAL_MODULES``).

Light on purpose: it runs on every ``import verl``, in vLLM's processes too. It registers the estimators, puts the
guards of ``sayo_verl.compat`` and the adapters of other model families in place and, only with ``VERL_PLATFORM=cpu``,
the CPU platform. Engines are registered by ``sayo_verl.engine`` in workers and trainers by ``sayo_verl.trainer.modes``
in the task runner.

verl logs an entry point that raises at DEBUG and goes on, so the launcher also names this module in
``VERL_USE_EXTERNAL_MODULES``, where an error is an error.
"""

import os

import wrapt

from sayo_verl import compat
from sayo_verl.adapters import internvl, qwen2_5_vl
from sayo_verl.trainer.context import register_estimators

compat.require_supported_verl()
if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from sayo_verl.platform import cpu, polling

    cpu.activate()
    wrapt.register_post_import_hook(polling.read_poll_interval, "verl.trainer.ppo.v1.replay_buffer")
compat.guard_equal_length_mrope()
# After their import, which takes seconds that most processes need not spend.
wrapt.register_post_import_hook(compat.guard_weight_socket, compat.WEIGHT_TRANSFER)
internvl.activate()
qwen2_5_vl.activate()
register_estimators()
