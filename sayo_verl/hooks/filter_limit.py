"""An end for group filtering that finds no group to train on.

verl's V1 buffers replace each group whose values are all equal, and ignore ``max_num_gen_batches``. With a policy that
is always wrong, or always right, a run would generate without end. The launcher writes the limit (``filter_limit`` of
``sayo_verl.launch.training_check``) into ``sampler_kwargs``, which each buffer of verl keeps. Estimators of verl's own
get it as well.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from sayo_verl.errors import SayoError


@dataclass
class Filtered:
    """What a buffer filtered.

    Attributes:
        since_batch: value of a group -> groups dropped since the last batch.
        in_a_row: the same, since the last group that was kept.
        kept: groups that wait to be sampled.
    """

    since_batch: Counter[float] = field(default_factory=Counter)
    in_a_row: Counter[float] = field(default_factory=Counter)
    kept: int = 0


def stop_endless_filtering(replay_buffer: ModuleType) -> None:
    """Make verl's replay buffers raise A26 at the limit of the configuration, if there is one.

    Args:
        replay_buffer: ``verl.trainer.ppo.v1.replay_buffer``. Its ``ReplayBufferAsync`` inherits from ``ReplayBuffer``.
    """
    cls: Any = replay_buffer.ReplayBuffer
    evict, materialize = cls._evict_terminal_groups, cls._materialize_batch

    @functools.wraps(evict)
    def _evict_terminal_groups(self: Any, global_steps: int, partition_id: str, eviction_reasons: Any) -> Any:
        found = evict(self, global_steps, partition_id, eviction_reasons)
        limit = (self.sampler_kwargs or {}).get("filter_limit")
        if limit is not None and partition_id != "val":
            seen = self.__dict__.setdefault("_sayo_filtered", Filtered())
            kept = len(self._sampleable_terminal_keys(partition_id, eviction_reasons))
            if kept > seen.kept:
                seen.in_a_row.clear()
            seen.kept = kept
            for counted in (seen.since_batch, seen.in_a_row):
                counted.update(eviction_reasons[3])
            check_limit(seen, int(limit["groups"]), int(limit["needed"]), self.filter_groups_metric)
        return found

    @functools.wraps(materialize)
    def _materialize_batch(self: Any, partition_id: str, *args: Any, **kwargs: Any) -> Any:
        if partition_id != "val":
            self.__dict__.pop("_sayo_filtered", None)
        return materialize(self, partition_id, *args, **kwargs)

    cls._evict_terminal_groups, cls._materialize_batch = _evict_terminal_groups, _materialize_batch


def check_limit(seen: Filtered, groups: int, needed: int, metric: str) -> None:
    """Refuse to generate on when the limit is reached.

    Args:
        seen: what was filtered.
        groups: the limit.
        needed: groups of a batch: so many must be kept when ``groups`` were generated since the last batch. 0: so many
            groups may be dropped in a row.
        metric: ``algorithm.filter_groups.metric``.

    Raises:
        SayoError: A26.
    """
    dropped = seen.since_batch if needed else seen.in_a_row
    total = dropped.total()
    if not total or (total < groups if not needed else total + seen.kept < groups or seen.kept >= needed):
        return
    values = ", ".join(f"{n} with {metric} {value:g} in every response" for value, n in dropped.most_common(3))
    more = f", {len(dropped) - 3} other values" if len(dropped) > 3 else ""
    raise SayoError(
        "A26",
        "group filtering does not find enough groups whose responses differ"
        if needed
        else "group filtering finds no group whose responses differ",
        where="algorithm.filter_groups",
        got=f"{total} dropped groups {'since the last batch' if needed else 'in a row'}: {values}{more}"
        + (f"; {seen.kept} kept" if needed else ""),
        wanted=f"{needed} kept groups of {groups} (max_num_gen_batches)" if needed else f"one of {groups}",
        fix="read some responses (trainer.rollout_data_dir=FOLDER writes them). Use easier or harder rows, raise "
        "actor_rollout_ref.rollout.n, or set algorithm.filter_groups.enable=False; a larger "
        "algorithm.filter_groups.max_num_gen_batches allows more groups",
    )
