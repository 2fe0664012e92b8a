"""The trainers with attention on a real TransferQueue and Ray; a worker group returns recognisable statistics."""

import copy
import dataclasses
import functools
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

os.environ["TRANSFER_QUEUE_ENABLE"] = "1"  # verl reads it when its decorators are made

import numpy as np
import ray
import transfer_queue as tq
from hydra import compose, initialize_config_module
from transfer_queue import KVBatchMeta
from transformers import Qwen3VLConfig
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import response_from_nested

from sayo_verl.errors import SayoError
from sayo_verl.hooks import store
from sayo_verl.launch.cluster import node_name
from sayo_verl.launch.settings import method_from_config
from sayo_verl.methods import Needs, Reported
from sayo_verl.methods.region import EPS, RegionMethod, select_tokens
from sayo_verl.probe.statistics import (
    INTERVENTION_KEY,
    PER_ROW,
    REQUEST_KEY,
    WIRE_PREFIX,
    Statistic,
    StatisticsRequest,
    log_probs_key,
)
from sayo_verl.vision.intervention import Intervention

IMAGE_TOKENS, REGION_TOKENS = 9.0, 2.0


@pytest.fixture(scope="module")
def config():
    with initialize_config_module("sayo_verl.config", version_base=None):
        return compose(
            "sayo_trainer",
            overrides=[
                "actor_rollout_ref.rollout.name=vllm",
                "transfer_queue.enable=True",
                "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
                "actor_rollout_ref.rollout.calculate_log_probs=False",
            ],
        )


@pytest.fixture(scope="module")
def queue(config):
    ray.init(address="local", num_cpus=6, include_dashboard=False, object_store_memory=150_000_000, log_to_driver=False)
    tq.init(config.transfer_queue)
    yield
    tq.close()
    ray.shutdown()


class FakeWorkerGroup:
    """Answers compute_log_prob like one worker: statistics are simple functions of token ids and positions."""

    workers = (None,)
    omit: str | None = None

    def __init__(self):
        self.requests, self.calls = [], []

    def save_model_to_cpu(self, n):
        self.calls.append(f"save {n}")

    def restore_model_from_cpu(self, n):
        self.calls.append(f"restore {n}")

    def clear_cpu_model(self, n):
        self.calls.append(f"clear {n}")

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def compute_log_prob(self, data):
        request = tu.get_non_tensor_data(data, REQUEST_KEY, None)
        change = tu.get_non_tensor_data(data, INTERVENTION_KEY, None)
        self.requests.append(request if change is None else change)
        self.calls.append("counterfactual" if change else "probe" if request else "log-probs")
        ids = data["input_ids"]
        values, offsets = ids.values().float(), ids.offsets()
        jagged = functools.partial(torch.nested.nested_tensor_from_jagged, offsets=offsets)
        of_response = lambda values: response_from_nested(jagged(values), data["response_mask"])  # noqa: E731
        single = functools.partial(torch.nested.nested_tensor_from_jagged, offsets=torch.arange(len(data) + 1))
        if change is not None:
            assert not tu.get_non_tensor_data(data, "calculate_entropy", True)
            changed = of_response(-values / (500 - 100 * change["draw"]))
            key = log_probs_key(Intervention.from_wire(change))
            return tu.get_tensordict({key: changed}, {"metrics": {"mfu": 0.0}})
        out = {"log_probs": jagged(-values / 1000)}
        if tu.get_non_tensor_data(data, "calculate_entropy", False):
            out["entropy"] = jagged((values * 7 % 11) / 11)
        if request is not None:
            out |= {
                WIRE_PREFIX + Statistic("image_mass").key: of_response(values / 2000),
                WIRE_PREFIX + Statistic("region_mass").key: of_response(values / 2000 * 0.5),
                "sayo_image_tokens": single(torch.full((len(data),), IMAGE_TOKENS)),
                "sayo_region_tokens": single(torch.full((len(data),), REGION_TOKENS)),
                "sayo_probe_seconds": single(torch.full((len(data),), 0.01)),
            }
            out.pop(self.omit, None)
        return tu.get_tensordict(out, {"metrics": {"mfu": 0.0}})


def put_batch(partition, order, lengths=(3, 5, 7, 9)):
    """Four rows of two prompts, put under their keys and asked for in another order."""
    rows, keys, tags = [], [], []
    for i, length in enumerate(lengths):
        prompt, response = (
            torch.arange(100 * i, 100 * i + 4 + i),
            torch.arange(100 * i + 4 + i, 100 * i + 4 + i + length),
        )
        ids = torch.cat([prompt, response])
        score = torch.zeros(length)
        score[-1] = float(i)
        rows.append(
            {
                "prompts": prompt,
                "responses": response,
                "input_ids": ids,
                "position_ids": torch.arange(len(ids))[None].repeat(4, 1),
                "response_mask": torch.ones(length).long(),
                "loss_mask": torch.ones(length).long(),
                "rm_scores": score,
                "uid": f"u{i // 2}",
                "extra_info": {"index": i},
                "multi_modal_inputs": {},
                "extra_fields": {"reward_extra_info": {"acc": float(i == 3), "format": 1.0}},
            }
        )
        keys.append(f"u{i // 2}_{i % 2}_0")
        tags.append(
            {
                "status": "success",
                "seq_len": len(ids),
                "prompt_len": len(prompt),
                "response_len": length,
                "min_global_steps": i % 2,
                "max_global_steps": 1,
            }
        )
    tq.kv_batch_put(keys=keys, partition_id=partition, fields=tu.list_of_dict_to_tensordict(rows), tags=tags)
    batch = KVBatchMeta(partition_id=partition, keys=[keys[i] for i in order], tags=[tags[i] for i in order])
    batch.extra_info["temperature"] = 1.0
    return batch, [rows[i] for i in order]


def make_trainer(config, group, method="attn_region", mode="sync", **settings):
    import sayo_verl.hooks.modes  # noqa: F401 (registers the trainers)

    trainer = object.__new__(get_trainer_cls(f"sayo_{mode}"))  # the real methods without verl's start-up
    trainer.local_trigger_step = 0
    trainer.config, trainer.actor_rollout_wg, trainer.ref_in_actor = config, group, True
    trainer._method = method_from_config(method, {"region": settings})
    trainer._needs = trainer._method.needs()
    trainer._request, trainer._spread_floor, trainer.global_steps = trainer._needs.statistics, None, 1
    trainer._log_prob_seconds, trainer._pending = 0.0, None
    trainer._thread = ThreadPoolExecutor(max_workers=1)
    return trainer


def one_step(config, partition, order, group=None, update=0, **settings):
    trainer, metrics = make_trainer(config, group or FakeWorkerGroup(), **settings), {}
    trainer.local_trigger_step = update
    batch, rows = put_batch(partition, order)
    after = trainer._compute_old_log_prob(batch, metrics)
    trainer._compute_ref_log_prob(after, metrics)
    done = trainer._compute_advantage(after, metrics)
    return trainer, done, rows, metrics


def expected_advantages(rows):
    """By hand from the fake statistics, which are functions of the id at position P + t - 1."""
    rewards = []
    for row in rows:
        prompt = len(row["prompts"])
        wire = row["input_ids"].float()[prompt - 1 : -1]
        entropy = (wire * 7 % 11) / 11
        chosen = select_tokens(entropy[None], torch.ones(1, len(wire)), 0.3)[0]
        target, image = wire / 2000 * 0.5 / REGION_TOKENS, wire / 2000 / IMAGE_TOKENS
        a, v = target[chosen].mean(), image[chosen].mean()
        rewards.append(row["rm_scores"].sum() + torch.tanh(torch.log((a + EPS) / (v + EPS))))
    token_level = torch.zeros(len(rows), 9)
    token_level[:, 0] = torch.stack(rewards)
    uid = np.array([row["uid"] for row in rows], dtype=object)
    return compute_grpo_outcome_advantage(token_level, torch.ones(len(rows), 9), uid)[0][:, 0], torch.stack(rewards)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 2, 1]], ids=["in-order", "permuted"])
def test_statistics_reach_the_estimator_row_by_row(queue, config, order):
    group = FakeWorkerGroup()
    _, batch, rows, metrics = one_step(config, f"train{order}", order, group)
    stored = store.fetch(batch, ["advantages", "returns", "token_level_rewards"])
    want, reward = expected_advantages(rows)
    for i, row in enumerate(rows):
        got = stored["advantages"].unbind()[i]
        assert got.shape[0] == len(row["responses"])
        torch.testing.assert_close(got, want[i].expand_as(got), rtol=0, atol=1e-5)
        torch.testing.assert_close(stored["token_level_rewards"].unbind()[i].sum(), reward[i], rtol=0, atol=1e-5)
    assert metrics["sayo/accuracy/mean"] == 0.25
    assert metrics["sayo/format/mean"] == 1.0
    assert metrics["sayo/rows_with_region_share"] == 1.0
    assert metrics["sayo/probe_seconds"] == pytest.approx(0.04)
    assert metrics["sayo/probe_share_of_log_prob"] > 0


def test_only_the_old_log_prob_pass_carries_the_request(queue, config):
    """The reference pass of a LoRA run is the same worker call; flagged, it would overwrite the statistics."""
    group = FakeWorkerGroup()
    one_step(config, "train-flag", [0, 1, 2, 3], group)
    assert group.requests == [RegionMethod().needs().statistics.to_wire(), None]


@pytest.mark.parametrize(
    ("mode", "update"), [("sync", 0), ("colocate_async", 0), ("separate_async", 0), ("separate_async", 1)]
)
def test_weight_zero_is_verls_grpo_bit_for_bit(queue, config, mode, update):
    _, batch, rows, _ = one_step(
        config, f"train-zero-{mode}-{update}", [2, 0, 3, 1], weight=0.0, mode=mode, update=update
    )
    token_level = torch.nested.as_nested_tensor([r["rm_scores"] for r in rows], layout=torch.jagged).to_padded_tensor(
        0.0
    )
    mask = torch.nested.as_nested_tensor([r["response_mask"] for r in rows], layout=torch.jagged).to_padded_tensor(0)
    want, _ = compute_grpo_outcome_advantage(token_level, mask, np.array([r["uid"] for r in rows], dtype=object))
    stored = store.fetch(batch, ["advantages"])["advantages"].unbind()
    for i, row in enumerate(rows):
        assert torch.equal(stored[i], want[i, : len(row["responses"])])


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_rollouts_by_earlier_weights_are_counted_where_a_mode_has_them(queue, config, mode):
    """Step 4 trains on the weights after step 3; verl tags a row with the versions that generated it."""
    trainer, metrics = make_trainer(config, FakeWorkerGroup(), mode=mode), {}
    trainer.global_steps = 4
    batch, _ = put_batch(f"train-stale-{mode}", [0, 1, 2, 3])
    batch = trainer._compute_old_log_prob(batch, metrics)
    for tag, (first, last) in zip(batch.tags, ((3, 3), (1, 3), (2, 2), (0, 1)), strict=True):
        tag.update(min_global_steps=first, max_global_steps=last)
    batch.tags[3]["is_padding"] = True  # with the tags of a real row
    trainer._compute_advantage(batch, metrics)
    got = {name: metrics.get(f"sayo/{name}") for name in ("staleness/mean", "staleness/max", "partial_rollouts")}
    stale = {"staleness/mean": 1.0, "staleness/max": 2.0, "partial_rollouts": pytest.approx(1 / 3)}
    assert got == (dict.fromkeys(got) if mode == "sync" else stale)


def test_a_batch_of_padding_rows_has_no_staleness():
    tags = [{"is_padding": True, "min_global_steps": 0, "max_global_steps": 0}]
    assert store.staleness(SimpleNamespace(tags=tags), 3) == {}


def test_verl_reduces_staleness_over_the_updates_of_a_step_as_its_names_say():
    from verl.trainer.ppo.v1.utils import MetricsAggregator

    aggregator = MetricsAggregator()
    for mean, most, partial, rows in ((0.0, 0.0, 0.0, 3), (2.0, 3.0, 0.5, 1)):
        values = {"sayo/staleness/mean": mean, "sayo/staleness/max": most, "sayo/partial_rollouts": partial}
        aggregator.add_step_metrics(values, sample_count=rows)
    want = {"sayo/staleness/mean": 0.5, "sayo/staleness/max": 3.0, "sayo/partial_rollouts": 0.125}
    assert aggregator.get_aggregated_metrics() == want


@pytest.mark.parametrize("absent", ["sayo_region_mass.input.L-1", "sayo_image_tokens"])
def test_an_absent_statistic_stops_the_step(queue, config, absent):
    group = FakeWorkerGroup()
    group.omit = absent
    with pytest.raises(SayoError, match=rf"SAYO-A06: TransferQueue holds no {absent}.*fix: "):
        one_step(config, f"train-absent-{absent}", [0, 1, 2, 3], group)


@pytest.mark.parametrize("lengths", [(3, 5, 7, 9), (4, 4, 4, 4)], ids=["ragged", "equally-long"])
def test_statistics_of_several_values_per_token_come_back_in_shape(queue, config, lengths):
    """Through TransferQueue as [tokens, W]; equally long rows are where jagged tensors of three dimensions go wrong."""
    batch, rows = put_batch(f"train-wide{lengths}", [2, 0, 3, 1], lengths)
    wide = Statistic("top_patch_mass", size=3)
    values = [row["responses"].float()[:, None] + torch.tensor([0.1, 0.2, 0.3]) for row in rows]
    ones = [torch.ones(1)] * 4
    fields = {WIRE_PREFIX + name: torch.nested.as_nested_tensor(ones, layout=torch.jagged) for name in PER_ROW}
    fields[WIRE_PREFIX + wide.key] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
    for name in ("entropy", "old_log_probs"):
        zeros = [torch.zeros(len(r["responses"])) for r in rows]
        fields[name] = torch.nested.as_nested_tensor(zeros, layout=torch.jagged)
    tq.kv_batch_put(
        keys=batch.keys, partition_id=batch.partition_id, fields=tu.get_tensordict(fields, non_tensor_dict={})
    )
    signals, _ = store.fetch_signals(batch, Needs(StatisticsRequest((wide,))))
    assert signals[wide].shape == (4, max(lengths), 3)
    for n, (row, value) in enumerate(zip(rows, values, strict=True)):
        T = len(row["responses"])
        assert torch.equal(signals[wide][n, :T], value)
        assert (signals[wide][n, T:] == 0).all()


def test_values_that_do_not_fit_the_responses_stop_the_step(queue, config):
    class WholeSequences(FakeWorkerGroup):
        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def compute_log_prob(self, data):
            out, key = super().compute_log_prob(data), WIRE_PREFIX + Statistic("region_mass").key
            out[key] = out["log_probs"]
            return out

    with pytest.raises(SayoError, match=r"SAYO-A02: the values of sayo_region_mass.*one per response token.*fix: "):
        one_step(config, "train-whole", [0, 1, 2, 3], WholeSequences())


@dataclass(frozen=True)
class Counterfactual(RegionMethod):
    """The region method with further passes; keeps what it was given."""

    seen: list = field(default_factory=list)
    interventions: tuple = (Intervention(seed=7),)

    def needs(self):
        return dataclasses.replace(super().needs(), interventions=self.interventions, correctness=True)

    def credit(self, signals):
        self.seen.append(signals)
        return super().credit(signals)


def test_the_counterfactual_pass_leaves_the_first_pass_as_it_was(queue, config):
    group, metrics = FakeWorkerGroup(), {}
    trainer = make_trainer(config, group)
    trainer._method = method = Counterfactual()
    trainer._needs = method.needs()
    batch, rows = put_batch("train-counterfactual", [2, 0, 3, 1])
    after = trainer._compute_old_log_prob(batch, metrics)
    stored = {
        name: tq.kv_batch_get(keys=after.keys, partition_id=after.partition_id, select_fields=[name])[name]
        for name in ("old_log_probs", "entropy", "log_probs")
    }
    assert INTERVENTION_KEY not in batch.extra_info
    trainer._compute_ref_log_prob(after, metrics)
    trainer._compute_advantage(after, metrics)
    probe, change, reference = group.requests
    assert probe == trainer._request.to_wire()
    assert change == {**Intervention(seed=7).to_wire(), "coverage": 0.5, "step": 1}
    assert reference is None
    (signals,) = method.seen
    for n, row in enumerate(rows):
        prompt, T = len(row["prompts"]), len(row["responses"])
        wire = row["input_ids"].float()[prompt - 1 : prompt - 1 + T]
        assert torch.equal(signals.log_probs[n, :T], -wire / 1000)
        assert torch.equal(signals.counterfactual(Intervention(seed=7))[n, :T], -wire / 500)
        assert torch.equal(stored["old_log_probs"].unbind()[n], -wire / 1000)
        assert torch.equal(stored["log_probs"].unbind()[n], -row["input_ids"].float() / 1000)
    assert signals.required("correct").tolist() == [float(row["extra_info"]["index"] == 3) for row in rows]
    assert signals.uid == tuple(row["uid"] for row in rows)
    assert metrics["sayo/counterfactual_seconds"] > 0
    assert not [name for name in metrics if name.startswith("sayo/counterfactual_seconds/")]


def test_every_intervention_has_a_pass_of_its_own_and_its_cost_is_logged(queue, config):
    group, metrics = FakeWorkerGroup(), {}
    trainer = make_trainer(config, group)
    box, *others = Intervention("region"), Intervention("elsewhere", draw=1), Intervention("elsewhere", draw=2)
    trainer._method = method = Counterfactual(interventions=(box, *others))
    trainer._needs = method.needs()
    batch, rows = put_batch("train-passes", [2, 0, 3, 1])
    after = trainer._compute_old_log_prob(batch, metrics)
    trainer._compute_advantage(after, metrics)
    assert group.calls == ["probe", *["counterfactual"] * 3]
    assert group.requests[1:] == [{**i.to_wire(), "coverage": 0.5, "step": 1} for i in (box, *others)]
    (signals,) = method.seen
    assert list(signals.counterfactuals) == [box, *others]
    for n, row in enumerate(rows):
        prompt, T = len(row["prompts"]), len(row["responses"])
        wire = row["input_ids"].float()[prompt - 1 : prompt - 1 + T]
        assert torch.equal(signals.log_probs[n, :T], -wire / 1000)
        for intervention, divisor in ((box, 500), (others[0], 400), (others[1], 300)):
            assert torch.equal(signals.counterfactual(intervention)[n, :T], -wire / divisor)
    spent = [metrics[f"sayo/counterfactual_seconds/{i.key}"] for i in (box, *others)]
    assert min(spent) > 0
    assert metrics["sayo/counterfactual_seconds"] == pytest.approx(sum(spent))


def test_the_passes_of_a_later_update_run_while_verl_has_the_old_policy_restored(queue, config):
    group = FakeWorkerGroup()
    trainer = make_trainer(config, group, mode="separate_async")
    trainer._method = method = Counterfactual()
    trainer._needs = method.needs()
    for update, want in (
        (0, ["save 0", "probe", "counterfactual"]),
        (1, ["save 1", "restore 0", "probe", "counterfactual", "restore 1", "clear 1"]),
    ):
        trainer.local_trigger_step = update
        trainer._compute_old_log_prob(put_batch(f"train-order-{update}", [2, 0, 3, 1])[0], {})
        assert group.calls == want
        group.calls.clear()


@pytest.mark.parametrize("info", [{}, {"acc": None}, {"acc": "yes"}, {"acc": float("nan")}])
def test_a_reward_function_that_does_not_say_what_is_right_stops_a_gated_method(queue, config, info):
    trainer, metrics = make_trainer(config, FakeWorkerGroup()), {}
    trainer._needs = dataclasses.replace(trainer._needs, correctness=True)
    batch, rows = put_batch(f"train-no-acc-{info}", [0, 1, 2, 3])
    infos = [{"reward_extra_info": {"format": 1.0, **info}} for _ in rows]
    fields = tu.list_of_dict_to_tensordict([{"extra_fields": info} for info in infos])
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
    with pytest.raises(SayoError, match=r"SAYO-A17: .*fix: .*sayo.correct_from"):
        trainer._compute_old_log_prob(batch, metrics)


@pytest.mark.parametrize("correct_from", [0.9, 2, None])
def test_a_reward_can_say_what_is_right(queue, config, correct_from):
    """verl stores rewards as float32, in which 0.9 is less than in Python."""
    trainer = make_trainer(copy.deepcopy(config), FakeWorkerGroup())
    trainer.config.sayo.correct_from = correct_from
    trainer._needs = dataclasses.replace(trainer._needs, correctness=True)
    batch, rows = put_batch(f"train-correct-{correct_from}", [2, 0, 3, 1])
    scores = torch.nested.as_nested_tensor(
        [r["rm_scores"] * (0.9 if correct_from == 0.9 else 1.0) for r in rows], layout=torch.jagged
    )
    fields = tu.get_tensordict({"rm_scores": scores}, non_tensor_dict={})
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
    trainer._compute_old_log_prob(batch, {})
    least = {0.9: 1, 2: 2, None: 3}[correct_from]  # of the row's index, which is its score; acc is 1 for index 3
    right = [float(row["extra_info"]["index"] >= least) for row in rows]
    assert trainer._pending.signals.required("correct").tolist() == right
    batch.tags[2]["is_padding"] = True  # a padding row copies a real one
    assert store._correct(batch, correct_from).tolist() == [*right[:2], 0.0, right[3]]


MARKS = Reported("walk_marks", lambda tokens, seed: "." * tokens)
DEPTH = Reported("depth", lambda tokens, seed: 1.0)


def put_reports(batch, infos) -> None:
    fields = tu.list_of_dict_to_tensordict([{"extra_fields": {"reward_extra_info": info}} for info in infos])
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


def test_fields_of_the_reward_function_reach_the_method_row_by_row(queue, config):
    trainer = make_trainer(config, FakeWorkerGroup())
    trainer._needs = dataclasses.replace(trainer._needs, reported=(MARKS, DEPTH))
    batch, rows = put_batch("train-reported", [2, 0, 3, 1])
    told = [row["extra_info"]["index"] for row in rows]
    put_reports(batch, [{"walk_marks": "." * n, "depth": n} for n in told])
    trainer._compute_old_log_prob(batch, {})
    signals = trainer._pending.signals
    assert signals.reported("walk_marks") == tuple("." * n for n in told)
    assert signals.reported("depth") == tuple(map(float, told))
    with pytest.raises(SayoError, match=r"SAYO-A10: .*fix: .*Reported"):
        signals.reported("width")
    batch.tags[2]["is_padding"] = True  # a padding row copies a real one
    assert store._reports(batch, ["depth"])["depth"][2] is None


@pytest.mark.parametrize("info", [{}, {"walk_marks": None}, {"walk_marks": ["."]}, {"walk_marks": float("nan")}])
def test_a_reward_function_that_does_not_report_what_a_method_reads_stops_the_step(queue, config, info):
    trainer = make_trainer(config, FakeWorkerGroup())
    trainer._needs = dataclasses.replace(trainer._needs, reported=(MARKS,))
    batch, rows = put_batch(f"train-no-report-{info}", [0, 1, 2, 3])
    put_reports(batch, [{"walk_marks": "."}, *[{"acc": 1.0, **info} for _ in rows[1:]]])
    with pytest.raises(SayoError, match=r"SAYO-A23: .*walk_marks.*fix: "):
        trainer._compute_old_log_prob(batch, {})


def test_reward_parts_that_are_no_numbers_are_not_averaged(queue, config):
    batch, _ = put_batch("train-parts", [0, 1, 2, 3])
    infos = [{"acc": None, "format": "good"}, {"acc": 1, "format": "bad"}, {"acc": "0"}, {"acc": False}]
    fields = tu.list_of_dict_to_tensordict([{"extra_fields": {"reward_extra_info": info}} for info in infos])
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
    assert store.fetch_reward_parts(batch) == {"accuracy": 0.5}


def test_a_reward_model_returns_nothing_beside_the_score(queue, config):
    trainer, metrics = make_trainer(config, FakeWorkerGroup()), {}
    batch, rows = put_batch("train-reward-model", [0, 1, 2, 3])
    fields = tu.list_of_dict_to_tensordict([{"extra_fields": {"global_steps": 1}} for _ in rows])
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
    trainer._compute_advantage(trainer._compute_old_log_prob(batch, metrics), metrics)
    assert "sayo/accuracy/mean" not in metrics


@dataclass(frozen=True)
class Waiting(RegionMethod):
    """The region method when it may; keeps what it was given, and in which thread."""

    may: threading.Event = field(default_factory=threading.Event)
    seen: list = field(default_factory=list)

    def credit(self, signals):
        self.seen.append((threading.current_thread() is threading.main_thread(), signals))
        assert self.may.wait(30)
        return super().credit(signals)


def test_credit_is_computed_while_verl_goes_on(queue, config):
    trainer, metrics = make_trainer(config, FakeWorkerGroup()), {}
    trainer._method = method = Waiting()
    batch, rows = put_batch("train-ahead", [2, 0, 3, 1])
    after = trainer._compute_old_log_prob(batch, metrics)  # returns although the credit is not there
    trainer._compute_ref_log_prob(after, metrics)
    method.may.set()
    done = trainer._compute_advantage(after, metrics)
    ((in_main, _),) = method.seen
    assert not in_main
    assert metrics["sayo/credit_seconds"] > 0
    assert metrics["sayo/credit_wait_seconds"] < 30
    want, _ = expected_advantages(rows)
    for i, got in enumerate(store.fetch(done, ["advantages"])["advantages"].unbind()):
        torch.testing.assert_close(got, want[i].expand_as(got), rtol=0, atol=1e-5)


def test_a_batch_that_changed_on_the_way_gets_its_own_credit(queue, config):
    trainer, metrics = make_trainer(config, FakeWorkerGroup()), {}
    trainer._method = method = Waiting()
    method.may.set()
    batch, rows = put_batch("train-reordered", [0, 1, 2, 3])
    after = trainer._compute_old_log_prob(batch, metrics)
    order = [3, 1, 0, 2]
    turned = KVBatchMeta(
        partition_id=after.partition_id, keys=[after.keys[i] for i in order], tags=[after.tags[i] for i in order]
    )
    done = trainer._compute_advantage(turned, metrics)
    first, second = (signals.uid for _, signals in method.seen)
    assert second == tuple(first[i] for i in order)
    want, _ = expected_advantages([rows[i] for i in order])
    for i, got in enumerate(store.fetch(done, ["advantages"])["advantages"].unbind()):
        torch.testing.assert_close(got, want[i].expand_as(got), rtol=0, atol=1e-5)


def test_what_fails_in_the_thread_stops_the_step(queue, config):
    @dataclass(frozen=True)
    class Broken(RegionMethod):
        def credit(self, signals):
            raise SayoError("A16", "broken", where="here", fix="mend it")

    trainer, metrics = make_trainer(config, FakeWorkerGroup()), {}
    trainer._method = Broken()
    batch, _ = put_batch("train-broken", [0, 1, 2, 3])
    after = trainer._compute_old_log_prob(batch, metrics)
    with pytest.raises(SayoError, match="SAYO-A16: broken"):
        trainer._compute_advantage(after, metrics)


def test_padding_rows_are_neutral_and_not_counted(queue, config):
    trainer, metrics = make_trainer(config, FakeWorkerGroup()), {}
    batch, _ = put_batch("train-pad", [0, 1, 2, 3])
    batch = trainer._compute_old_log_prob(batch, metrics)
    batch.tags[3]["is_padding"] = True
    trainer._compute_advantage(batch, metrics)
    assert metrics["sayo/neutral_rows/padding"] == 1.0
    assert metrics["sayo/rows_with_region_share"] == 1.0
    assert metrics["sayo/accuracy/mean"] == 0.0, "the padding row's copied reward must not count"


def test_more_outputs_than_sessions_are_refused(queue, config):
    trainer = make_trainer(config, FakeWorkerGroup())
    batch = SimpleNamespace(keys=["u0_0_0", "u0_0_1"], tags=[{}, {}], partition_id="train")
    with pytest.raises(SayoError, match=r"SAYO-A07: .*one output per session"):
        trainer._compute_advantage(batch, {})


def test_advantages_that_bypass_the_registered_estimator_are_refused(queue, config, monkeypatch):
    monkeypatch.setattr(PPOTrainer, "_compute_advantage", lambda self, batch, metrics: batch)
    with pytest.raises(SayoError, match=r"SAYO-A08: .*without calling the registered estimator"):
        one_step(config, "bypassed", [0, 1, 2, 3])


def test_the_handshake_names_a_worker_without_the_plugin(queue, config):
    """Workers that report another version or verl's own engine end the run before step 1."""

    @ray.remote
    class Worker:
        def __init__(self, bases):
            engine = type("Engine", tuple(type(name, (), {}) for name in bases), {})()
            decoder = type("Qwen3VLTextModel", (torch.nn.Module,), {})()
            attention = type("Qwen3VLTextAttention", (torch.nn.Linear,), {})
            decoder.layers = torch.nn.ModuleList([attention(1, 1) for _ in range(2)])
            for i, layer in enumerate(decoder.layers):
                layer.layer_idx = i
            engine.module = torch.nn.ModuleList([decoder])
            text = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
            engine.model_config = SimpleNamespace(hf_config=Qwen3VLConfig(text_config=text), use_remove_padding=True)
            actor = SimpleNamespace(actor=SimpleNamespace(engine=engine))
            # separate_async without rollouts on the trainer's devices has a reference worker of its own
            self.worker_dict = {"actor": actor, "ref": SimpleNamespace(actor=None), "critic": SimpleNamespace()}

    trainer = make_trainer(config, FakeWorkerGroup())
    right = Worker.options(num_cpus=0).remote(["AttentionStatisticsMixin"])
    wrong = Worker.options(num_cpus=0).remote(["FSDPEngineWithLMHead"])
    trainer.actor_rollout_wg = SimpleNamespace(workers=[right])
    trainer._handshake()
    trainer.actor_rollout_wg = SimpleNamespace(workers=[right, wrong])
    node = re.escape(node_name(ray.nodes()[0]))
    with pytest.raises(SayoError, match=rf"SAYO-X03: worker 1 did not load this .* at node {node}, pid \d+.*fix: "):
        trainer._handshake()
    trainer.actor_rollout_wg = SimpleNamespace(workers=[right])
    trainer._request = RegionMethod(layers=(35,)).needs().statistics
    with pytest.raises(SayoError, match=r"SAYO-P03: the model has 2 decoder layers"):
        trainer._handshake()


def test_a_trainer_of_ours_refuses_an_estimator_of_verls(config):
    from omegaconf import OmegaConf

    from sayo_verl.hooks.modes import SayoSync

    other = OmegaConf.merge(config, {"algorithm": {"adv_estimator": "grpo"}})
    with pytest.raises(SayoError, match="SAYO-A09"):
        SayoSync(other)


def test_the_estimator_without_the_launcher_is_refused():
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    rows = {"token_level_rewards": torch.ones(2, 3), "response_mask": torch.ones(2, 3), "index": np.array(["a", "a"])}
    with pytest.raises(SayoError, match="SAYO-A01: attn_region was called without the attention statistics"):
        get_adv_estimator_fn("attn_region")(**rows, config={})
