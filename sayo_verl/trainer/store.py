"""The data plane: fetching statistics from TransferQueue by row key. The only file that names TransferQueue.

``kv_batch_get`` leaves absent fields out without a word, so presence is checked here.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import NonTensorData, TensorDict
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_from_nested, response_to_nested

from sayo_verl.errors import SayoError
from sayo_verl.methods import Signals
from sayo_verl.probe.statistics import PER_ROW, WIRE_PREFIX, Statistic


def fetch(batch: KVBatchMeta, fields: Sequence[str]) -> TensorDict:
    """The named fields of the batch's rows, in the order of ``batch.keys``.

    Raises:
        SayoError: A06 when a field is absent.
    """
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields))
    missing = sorted(set(fields) - set(data.keys()))
    if missing:
        raise SayoError(
            "A06",
            f"TransferQueue holds no {', '.join(missing)} for this batch",
            where=f"partition {batch.partition_id!r}, {len(batch.keys)} rows",
            got=sorted(data.keys()),
            wanted=list(fields),
            fix="the workers did not run the engine with the attention mixin; run `sayo doctor`",
        )
    return data


def fetch_signals(batch: KVBatchMeta, statistics: Sequence[Statistic]) -> tuple[Signals, float]:
    """The statistics of the old-log-prob pass, padded like verl pads its own fields, and the probe's total seconds."""
    wire = {statistic: WIRE_PREFIX + statistic.key for statistic in statistics}
    per_row = {name: WIRE_PREFIX + name for name in PER_ROW}
    data = fetch(batch, ["response_mask", "entropy", *wire.values(), *per_row.values()])
    mask = data["response_mask"]
    rows = {name: torch.cat(list(data[key].unbind())).float() for name, key in per_row.items()}
    signals = Signals(
        response_mask=mask.to_padded_tensor(0),
        entropy=data["entropy"].to_padded_tensor(0.0).float(),  # already sliced to the response by verl
        statistics={
            statistic: response_from_nested(data[key], mask).to_padded_tensor(0.0).float()
            for statistic, key in wire.items()
        },
        image_tokens=rows["image_tokens"],
        region_tokens=rows["region_tokens"],
        is_padding=torch.tensor([bool(tag.get("is_padding", False)) for tag in batch.tags]),
    )
    return signals, float(rows["probe_seconds"].sum())


def fetch_reward_parts(batch: KVBatchMeta) -> dict[str, float]:
    """Batch means of ``accuracy`` and ``format`` as the reward function reported them, padding rows left out."""
    data = fetch(batch, ["extra_fields"])
    totals: dict[str, list[float]] = {}
    for row, tag in zip(data["extra_fields"], batch.tags, strict=True):
        info = (row.data if isinstance(row, NonTensorData) else row)["reward_extra_info"]
        if not tag.get("is_padding", False):
            for key, name in (("acc", "accuracy"), ("format", "format")):
                if key in info:
                    totals.setdefault(name, []).append(float(info[key]))
    return {name: sum(values) / len(values) for name, values in totals.items()}


def put_token_level_rewards(batch: KVBatchMeta, reward_B: torch.Tensor) -> None:
    """Store the shaped reward at each response's last token: verl's critic/rewards/* then shows it."""
    mask = fetch(batch, ["response_mask"])["response_mask"]
    padded = mask.to_padded_tensor(0)
    rewards: Any = torch.zeros(padded.shape, dtype=torch.float32)
    lengths = torch.tensor([row.shape[0] for row in mask.unbind()])
    rows = (lengths > 0).nonzero().flatten()
    rewards[rows, lengths[rows] - 1] = reward_B.float()[rows]
    fields = TensorDict({"token_level_rewards": response_to_nested(rewards, mask)}, batch_size=len(batch.keys))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
