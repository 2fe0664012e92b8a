"""Access to TransferQueue by row key.

``kv_batch_get`` leaves out missing fields silently, so this module checks that they are present.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import NonTensorData, TensorDict
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_to_nested

from sayo_verl.errors import SayoError
from sayo_verl.hooks.rollout_errors import row_name
from sayo_verl.methods import Needs, Signals
from sayo_verl.probe.statistics import PER_ROW, WIRE_PREFIX, log_probs_key
from sayo_verl.reward.number import number


def fetch(batch: KVBatchMeta, fields: Sequence[str]) -> TensorDict:
    """Fetch the named fields of the batch's rows, in the order of ``batch.keys``.

    Raises:
        SayoError: A06 for a missing field.
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
            fix="the workers ran without the attention mixin; run `sayo doctor`",
        )
    return data


def fetch_signals(batch: KVBatchMeta, needs: Needs, correct_from: float | str | None = None) -> tuple[Signals, float]:
    """Fetch the results of the log-prob passes, padded as verl pads its fields, and the probe's total seconds.

    Args:
        batch: the rows.
        needs: of the method.
        correct_from: ``sayo.correct_from``: a number is the smallest reward of a correct answer.

    Raises:
        SayoError: A02 for a row whose statistics do not fit its response, A06 for a missing field, A17 when the reward
            function returns no number as ``acc`` and the method needs it, A23 when it does not report another field
            that the method needs.
    """
    wire = {statistic: WIRE_PREFIX + statistic.key for statistic in needs.statistics.statistics}
    per_row = {name: WIRE_PREFIX + name for name in PER_ROW}
    wanted = ["response_mask", "entropy", "old_log_probs", "uid", *wire.values(), *per_row.values()]
    changed = {intervention: log_probs_key(intervention) for intervention in needs.interventions}
    wanted += changed.values()
    data = fetch(batch, wanted)
    mask = data["response_mask"]

    rows = {name: torch.cat(list(data[key].unbind())).float() for name, key in per_row.items()}
    is_padding = torch.tensor([bool(tag.get("is_padding", False)) for tag in batch.tags])
    signals = Signals(
        response_mask=mask.to_padded_tensor(0),
        # verl has sliced these two to the response; workers send the others for the response only
        entropy=data["entropy"].to_padded_tensor(0.0).float(),
        log_probs=data["old_log_probs"].to_padded_tensor(0.0).float(),
        statistics={statistic: _padded(data, key) for statistic, key in wire.items()},
        image_tokens=rows["image_tokens"],
        region_tokens=rows["region_tokens"],
        is_padding=is_padding,
        uid=tuple(map(str, data["uid"])),
        counterfactuals={intervention: _padded(data, key) for intervention, key in changed.items()},
        correct=_correct(batch, correct_from) if needs.correctness else None,
        reports=_reports(batch, [one.name for one in needs.reported]),
    )
    return signals, float(rows["probe_seconds"].sum())


def _padded(data: TensorDict, key: str) -> torch.Tensor:
    """[B, T] or [B, T, W] float32 of a field of the response tokens, zeros after each row's last."""
    got, wanted = data[key].offsets().diff().tolist(), data["response_mask"].offsets().diff().tolist()
    if got != wanted:
        raise SayoError(
            "A02",
            f"the values of {key} are not one per response token",
            where=f"TransferQueue, {len(wanted)} rows",
            got=got,
            wanted=wanted,
            fix="this is a defect of sayo-verl or a changed verl; run `sayo doctor` and report both",
        )
    return data[key].to_padded_tensor(0.0).float()


def reward_info(batch: KVBatchMeta) -> list[dict[str, Any]]:
    """What the reward function returned besides the score, for each row; empty for a padding row and a reward model."""
    infos = []
    for row, tag in zip(fetch(batch, ["extra_fields"])["extra_fields"], batch.tags, strict=True):
        plain = row.data if isinstance(row, NonTensorData) else row
        infos.append({} if tag.get("is_padding", False) else plain.get("reward_extra_info", {}))
    return infos


def _correct(batch: KVBatchMeta, correct_from: float | str | None) -> torch.Tensor:
    """[B] ``acc`` of the reward function, or whether the reward reaches ``correct_from``; 0 for padding rows."""
    if isinstance(correct_from, int | float):
        # in float32, as verl stores rewards: 0.9 is there less than Python's 0.9
        rewards = torch.stack([row.sum() for row in fetch(batch, ["rm_scores"])["rm_scores"].unbind()]).float()
        padding = torch.tensor([bool(tag.get("is_padding", False)) for tag in batch.tags])
        return ((rewards >= torch.tensor(float(correct_from))) & ~padding).float()
    out = []
    for key, info, is_padding in _infos(batch):
        acc = 0.0 if is_padding else number(info.get("acc"))
        if acc is None:
            raise SayoError(
                "A17",
                "the method needs to know which answers are correct, and the reward function does not return it",
                where=f"row {key}",
                got=f"acc {info['acc']!r:.80}" if "acc" in info else sorted(info),
                wanted="a key 'acc' in what the reward function returns, 0 or 1",
                fix="return {'score': ..., 'acc': ...}, as sayo_verl.reward does, or set sayo.correct_from",
            )
        out.append(acc)
    return torch.tensor(out)


def _reports(batch: KVBatchMeta, names: Sequence[str]) -> dict[str, tuple[str | float | None, ...]]:
    """Name -> what the reward function reports of each row under it, text or a number; None for padding rows."""
    if not names:
        return {}
    found: dict[str, list[str | float | None]] = {name: [] for name in names}
    for key, info, padding in _infos(batch):
        for name, values in found.items():
            told = info.get(name)
            value = told if isinstance(told, str) else number(told)
            if value is None and not padding:
                raise SayoError(
                    "A23",
                    f"the method reads {name} of the reward function, which does not report it",
                    where=f"row {key}",
                    got=f"{name} {told!r:.80}" if name in info else sorted(info),
                    wanted=f"a key {name!r} in what the reward function returns, text or a number",
                    fix="return it in the dict of the reward function, or choose a method that does not read it",
                )
            values.append(value)
    return {name: tuple(values) for name, values in found.items()}


def _infos(batch: KVBatchMeta) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Key, ``reward_info`` and whether it is padding, of each row."""
    padding = [bool(tag.get("is_padding", False)) for tag in batch.tags]
    return zip(batch.keys, reward_info(batch), padding, strict=True)


def fetch_reward_parts(batch: KVBatchMeta) -> dict[str, float]:
    """Batch means of the numbers that the reward function gives as ``acc`` and ``format``, without padding rows."""
    totals: dict[str, list[float]] = {}
    for info in reward_info(batch):
        for key, name in (("acc", "accuracy"), ("format", "format")):
            if (value := number(info.get(key))) is not None:
                totals.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in totals.items()}


def name_row(error: SayoError, batch: KVBatchMeta) -> SayoError:
    """The same error, with the row of data of ``error.row`` and its rollout; unchanged if there is no such row."""
    if error.row is None:
        return error
    key = batch.keys[error.row]
    one = KVBatchMeta(partition_id=batch.partition_id, keys=[key], tags=[batch.tags[error.row]])
    data = fetch(one, ["extra_info", "data_source"])
    found = {name: getattr(data[name][0], "data", data[name][0]) for name in ("extra_info", "data_source")}
    where = f"{error.where}: {row_name(found)}, rollout {key.rsplit('_', 2)[1]}"
    return SayoError(error.code, error.what, where=where, got=error.got, wanted=error.wanted, fix=error.fix)


def staleness(batch: KVBatchMeta, step: int) -> dict[str, float]:
    """How many versions of the weights behind the old policy the rollouts of a batch are, without padding rows.

    Version v is the weights after step v. The old policy of step s has version s - 1. verl tags each row with the
    first and the last version that generated its tokens; they differ in a rollout that an update interrupted.

    Returns:
        ``staleness/mean`` and ``staleness/max``, counted from the first version of a row, and ``partial_rollouts``, the
        share of rows with several versions. Empty for a batch of padding rows.
    """
    tags = [tag for tag in batch.tags if not tag.get("is_padding", False)]
    if not tags:
        return {}
    behind = [step - 1 - tag["min_global_steps"] for tag in tags]
    partial = sum(tag["min_global_steps"] != tag["max_global_steps"] for tag in tags)
    return {
        "staleness/mean": sum(behind) / len(tags),
        "staleness/max": float(max(behind)),
        "partial_rollouts": partial / len(tags),
    }


def put_token_level_rewards(batch: KVBatchMeta, reward_B: torch.Tensor) -> None:
    """Store the shaped reward at each response's last token, so that verl's critic/rewards/* shows it."""
    mask = fetch(batch, ["response_mask"])["response_mask"]
    padded = mask.to_padded_tensor(0)
    rewards: Any = torch.zeros(padded.shape, dtype=torch.float32)
    lengths = torch.tensor([row.shape[0] for row in mask.unbind()])
    rows = (lengths > 0).nonzero().flatten()
    rewards[rows, lengths[rows] - 1] = reward_B.float()[rows]
    fields = TensorDict({"token_level_rewards": response_to_nested(rewards, mask)}, batch_size=len(batch.keys))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
