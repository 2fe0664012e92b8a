"""Held-out rollouts in training: what is recorded, and that training does not notice.

The worker is verl's own training worker in this process. TransferQueue, the agent loops and the replay buffer are
stand-ins over dictionaries.
"""

import asyncio
import copy
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image
from support.engine_rows import RowShape, log_prob_pass, make_rows, model_config, worker
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.experimental.agent_loop import agent_loop
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import tensordict_utils as tu

from sayo_verl.errors import SayoError
from sayo_verl.hooks import record, record_agent, store
from sayo_verl.hooks.estimator import register_estimators
from sayo_verl.hooks.modes import SayoSync
from sayo_verl.hooks.record import Recorder, choose_rows
from sayo_verl.launch.settings import load_methods
from sayo_verl.methods import METHODS
from sayo_verl.methods.faithful import FaithfulMethod
from sayo_verl.methods.region import RegionMethod
from sayo_verl.probe.statistics import INTERVENTION_KEY, REQUEST_KEY, WIRE_PREFIX
from sayo_verl.report import causal
from sayo_verl.view.store import read_steps

pytestmark = pytest.mark.usefixtures("process_group")
BOXES = [[0.3, 0.0, 0.9, 0.5]]
SIZES = ((224, 192), (96, 64))  # 42 visual tokens, more than are kept for a word, and 6
N = 2  # rollouts per prompt


class Queue:
    """TransferQueue's calls of the trainer, over dictionaries of rows by partition."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, dict[str, Any]]] = {"train": {}, "val": {}}
        self.tags: dict[str, dict[str, dict[str, Any]]] = {"train": {}, "val": {}}

    def put_rows(self, partition: str, rows: list[dict[str, Any]], keys: list[str]) -> KVBatchMeta:
        tags = [{"min_global_steps": 0, "max_global_steps": 0} for _ in rows]
        self.rows[partition] |= dict(zip(keys, rows, strict=True))
        self.tags[partition] |= dict(zip(keys, tags, strict=True))
        return KVBatchMeta(partition_id=partition, keys=keys, tags=tags)

    def kv_batch_get(self, keys, partition_id, select_fields):
        rows = [self.rows[partition_id][key] for key in keys]
        data = tu.list_of_dict_to_tensordict([{f: row[f] for f in select_fields if f in row} for row in rows])
        for name, value in data.items():
            if isinstance(value, torch.Tensor) and not value.is_nested:
                data[name] = torch.nested.as_nested_tensor(list(value.unbind()), layout=torch.jagged)
        return data

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        for key, tag in zip(keys, tags or (), strict=bool(tags)):
            self.tags[partition_id][key] = tag
        for name in () if fields is None else fields.keys():
            for key, value in zip(keys, fields[name].unbind(), strict=True):
                self.rows[partition_id][key][name] = value.clone()
        return KVBatchMeta(partition_id=partition_id, keys=keys, tags=[self.tags[partition_id][key] for key in keys])

    def kv_clear(self, keys, partition_id):
        for key in keys:
            self.rows[partition_id].pop(key, None)
            self.tags[partition_id].pop(key, None)


class Workers:
    """A worker group of one process with verl's log-prob pass."""

    workers = (None,)

    def __init__(self, built, queue):
        self.built, self.queue, self._dispatch_info = built, queue, {"actor": [0]}

    def compute_log_prob(self, batch):
        info = batch.extra_info
        change = {INTERVENTION_KEY: info[INTERVENTION_KEY]} if INTERVENTION_KEY in info else {}
        rows = [self.queue.rows[batch.partition_id][key] for key in batch.keys]
        fields = ("prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask")
        rows = [{name: row[name] for name in (*fields, "multi_modal_inputs", "extra_info")} for row in rows]
        output = log_prob_pass(
            self.built, rows, info.get(REQUEST_KEY), calculate_entropy=info["calculate_entropy"], **change
        )
        tensors = {name: output[name] for name in output.keys() if isinstance(output[name], torch.Tensor)}
        return self.queue.kv_batch_put(batch.keys, batch.partition_id, TensorDict(tensors, batch_size=len(rows)))


class Dataset(list):
    """Held-out rows as verl's data set returns them. The first has no image, the second no box."""

    def __init__(self) -> None:
        super().__init__(self._row(i, size) for i, size in enumerate((None, (64, 64), *SIZES)))

    @staticmethod
    def _row(index: int, size: tuple[int, int] | None) -> dict[str, Any]:
        text = {"type": "text", "text": " What colour? "}
        content: Any = "What colour?"
        if size is not None:
            picture = Image.fromarray(np.random.default_rng(index).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
            content = [{"type": "image", "image": picture}, text]
        boxes = [BOXES] if size in SIZES else [[]]
        return {
            "raw_prompt": [{"role": "user", "content": content}],
            "extra_info": {"index": 10 + index, "boxes": boxes},
            "reward_model": {"ground_truth": "red"},
            "index": 10 + index,
        }


class AgentLoops:
    """Finishes every prompt at once, with rows that were made before."""

    def __init__(self, queue, rows):
        self.queue, self.rows, self.submitted = queue, rows, []

    def generate_sequences(self, batch):
        self.submitted.append(batch)
        for prompt, uid in enumerate(batch["uid"]):
            rows = [{**row, "uid": uid} for row in self.rows[N * prompt : N * prompt + N]]
            self.queue.put_rows("val", rows, [f"{uid}_{session}_0" for session in range(len(rows))])

    def sample(self, global_steps, partition_id, batch_size):
        assert batch_size == 2
        keys = [key for key in self.queue.rows["val"] if "_" in key]
        return KVBatchMeta(
            partition_id="val", keys=keys[::-1], tags=[self.queue.tags["val"][k] for k in keys[::-1]]
        ), {}


def rows_with_rewards(processor, shapes, seed):
    rows = make_rows(processor, seed, shapes)
    for n, row in enumerate(rows):
        row["rm_scores"] = torch.zeros(len(row["responses"]))
        row["rm_scores"][-1] = float(n % N)
        row["extra_fields"] = {"reward_extra_info": {"acc": float(n % N)}}
    return rows


@pytest.fixture(scope="module")
def config():
    with initialize_config_module("sayo_verl.config", version_base=None):
        return compose(
            "sayo_trainer",
            overrides=[
                "actor_rollout_ref.rollout.name=vllm",
                "actor_rollout_ref.rollout.calculate_log_probs=False",
                "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
                f"actor_rollout_ref.rollout.n={N}",
                "data.max_response_length=9",
                "sayo.viz_every=2",
            ],
        )


@pytest.fixture(scope="module")
def built(random_policy):
    model = model_config(random_policy, packed=True)
    return worker(model, dynamic=False), model


@pytest.fixture
def make(config, built, tmp_path, monkeypatch, random_policy):
    """A function that returns a trainer with a recorder, its queue, and the batch to train on."""

    def trainer_of(method, *, recording=True):
        monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
        engine, model = built
        queue = Queue()
        for module in (store, record, trainer_base):
            monkeypatch.setattr(module, "tq", queue)
        own = copy.deepcopy(config)
        own.actor_rollout_ref.model.path = str(random_policy)
        own.algorithm.adv_estimator = method.name if method else "grpo"
        trainer = object.__new__(SayoSync)  # the real methods without verl's start-up
        trainer.config, trainer.actor_rollout_wg, trainer.global_steps = own, Workers(engine, queue), 5
        trainer._method, trainer._spread_floor, trainer._pending = method, None, None
        trainer._needs = method and method.needs()
        if method:
            trainer._request = trainer._needs.statistics
        trainer._thread = ThreadPoolExecutor(max_workers=1)
        trainer.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
        held_out = [RowShape((size,), length, [BOXES]) for size in SIZES for length in (4, 9)]
        loops = AgentLoops(queue, rows_with_rewards(model.processor, held_out, 7))
        trainer.agent_loop_manager = trainer.replay_buffer = loops
        if recording:
            trainer._recorder = Recorder(own, method, None, model.tokenizer, Dataset())
        rows = rows_with_rewards(model.processor, None, 0)
        batch = queue.put_rows("train", rows, [f"u{n // 2}_{n % 2}_0" for n in range(len(rows))])
        return trainer, queue, batch

    monkeypatch.setattr(trainer_base.PPOTrainer, "step", lambda self, metrics, timing: self._step_once({}, {}, 1))
    monkeypatch.setattr(trainer_base.PPOTrainer, "_step_once", lambda *_: {})
    return trainer_of


def train_once(trainer, batch):
    """One step up to the advantages, and the state of random numbers after it."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    metrics: dict[str, float] = {}
    trainer.step(metrics, {})
    batch = trainer._compute_old_log_prob(batch, metrics)
    trainer._compute_advantage(batch, metrics)
    return metrics, (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()), batch.extra_info


@pytest.mark.parametrize("method", [RegionMethod(), FaithfulMethod(), None], ids=["region", "faithful", "grpo"])
def test_training_is_the_same_with_and_without_recording(make, method):
    results = []
    for recording in (False, True):
        trainer, queue, batch = make(method, recording=recording)
        results.append((*train_once(trainer, batch), queue))
    (metrics, state, extra, queue), (with_viz, state_viz, extra_viz, queue_viz) = results
    times = ("seconds", "share_of_log_prob")
    assert {k: v for k, v in metrics.items() if not k.endswith(times)} == {
        k: v for k, v in with_viz.items() if not k.endswith(times)
    }
    assert {"sayo/viz_seconds", "sayo/viz_wait_seconds"} == with_viz.keys() - metrics.keys()
    assert state == state_viz
    assert extra == extra_viz
    assert queue.tags["train"] == queue_viz.tags["train"]
    for key, row in queue.rows["train"].items():
        other = queue_viz.rows["train"][key]
        assert row.keys() == other.keys()
        for name, value in row.items():
            if isinstance(value, torch.Tensor) and "seconds" not in name:
                assert torch.equal(value.nan_to_num(-1), other[name].nan_to_num(-1)), (key, name)
    assert not queue_viz.rows["val"], "recorded rows are cleared"
    assert not [key for key in queue_viz.tags["val"] if "_" in key]


@pytest.mark.parametrize("method", [RegionMethod(), FaithfulMethod()], ids=["region", "faithful"])
def test_recorded_numbers_are_those_that_training_measures_for_the_same_rows(make, tmp_path, method):
    trainer, queue, batch = make(method)
    train_once(trainer, batch)
    (step,) = read_steps(tmp_path)
    assert step.step == 4
    # the same rows as a training batch, in the order of the recorded rows
    rows = [{**row, "uid": f"p{n // N}"} for n, row in enumerate(trainer.agent_loop_manager.rows)]
    again = queue.put_rows("train", rows, [f"p{n // N}_{n % N}_0" for n in range(len(rows))])
    trainer._recorder = None
    trainer.global_steps = record.MASK_STEP
    trainer._compute_old_log_prob(again, {})
    signals = trainer._pending.signals
    advantage = store.fetch(trainer_advantages(trainer, again), ["advantages"])["advantages"].unbind()
    responses = [response for _, of_prompt in step.prompts for response in of_prompt]
    for n, response in enumerate(responses):
        T = len(response.pieces)
        masses = {s.name: values for s, values in signals.statistics.items() if s.name in response.values}
        assert masses.keys() >= {"image_mass"}
        effect = (
            signals.log_probs - signals.counterfactual(method.needs().interventions[0])
            if method.needs().interventions
            else None
        )
        for name, values in {
            **masses,
            "entropy": signals.entropy,
            "log_prob": signals.log_probs,
            **({} if effect is None else {"effect": effect}),
        }.items():
            np.testing.assert_array_equal(response.values[name], values[n, :T], err_msg=name)
        np.testing.assert_array_equal(response.values["advantage"], advantage[n])
        # the report sets the effect beside the row that sampled the token, whichever row the method reads
        mass_T, row = response.values["image_mass"], response.facts["query_row"]
        predicting_T = causal.predicting_mass(response)
        assert row == ("input" if isinstance(method, RegionMethod) else "predicting")
        if row == "input":
            np.testing.assert_allclose(predicting_T[1:], mass_T[:-1], rtol=1e-5)
            assert np.isfinite(predicting_T[0])
        else:
            np.testing.assert_array_equal(predicting_T, mass_T)
        of_prompt = step.prompts[n // N]
        assert causal.effects_of(step, *of_prompt).tokens == sum(len(r.pieces) for r in of_prompt[1])
        assert "effect" in response.values, "also of a method without a changed image"


def trainer_advantages(trainer, batch):
    batch.extra_info.clear()
    return trainer._compute_advantage(batch, {})


def test_a_recorded_step_has_prompts_maps_and_facts(make, tmp_path):
    trainer, _, batch = make(RegionMethod())
    train_once(trainer, batch)
    (step,) = read_steps(tmp_path)
    assert "Generated with the weights of step 0, measured with the weights of step 4." in step.notes
    assert "Attention is read at layer index 1, the last of 2, where a token is the input." in step.notes
    for (prompt, responses), size, row in zip(step.prompts, SIZES, (2, 3), strict=True):
        assert prompt.where == f"held-out row {row} (extra_info.index {10 + row})"
        assert (prompt.question, prompt.answer, prompt.images[0].picture.size) == ("What colour?", "red", size)
        assert prompt.tokens == size[0] * size[1] // 32**2
        assert prompt.images[0].boxes == (tuple(BOXES[0]),)
        assert [len(response.pieces) for response in responses] == [4, 9]
        assert [response.facts["accuracy"] for response in responses] == [0.0, 1.0]
        assert [bool(response.notes) for response in responses] == [False, True], "the second may be cut"
        for response in responses:
            (maps,) = response.maps
            image, region = response.values["image_mass"], response.values["region_mass"]
            total_V = maps.total.unpack()[0]
            assert total_V.sum() == pytest.approx(image.mean(), rel=0.02)  # codes of one byte
            assert total_V[prompt.region].sum() == pytest.approx(region.mean(), rel=0.02)
            assert maps.words.unpack().shape == (len(response.words), prompt.tokens)
            kept = maps.words.unpack().sum(1)
            of_words = np.array([image[first:end].mean() for first, end in response.words])
            if prompt.tokens <= record.TOP_PATCHES:
                np.testing.assert_allclose(kept, of_words, rtol=0.03)
            else:
                assert ("most attended" in maps.label, (kept < of_words * 1.03).all()) == (True, True)


def test_a_recorded_bonus_is_what_it_added_to_the_advantage(make, tmp_path):
    load_methods([str(Path(__file__).parent.parent.parent / "recipe" / "example" / "reliance.py")])
    register_estimators()
    trainer, _, batch = make(METHODS["attn_reliance"](weight=0.5))
    metrics, *_ = train_once(trainer, batch)
    (step,) = read_steps(tmp_path)
    for _, responses in step.prompts:
        rewards = torch.tensor([[response.facts["reward"]] for response in responses])
        plain, _ = compute_grpo_outcome_advantage(rewards, torch.ones(N, 1), np.array(["a"] * N, object))
        for response, without in zip(responses, plain[:, 0].tolist(), strict=True):
            added = response.values["token_bonus"]
            np.testing.assert_allclose(without + added, response.values["advantage"], atol=1e-6)
            np.testing.assert_allclose(
                added, 0.5 * abs(without) * (1 - np.exp(-response.values["effect"])).clip(-1), atol=1e-5
            )
            assert added.any() == bool(without)
    assert metrics["sayo/token_bonus/size"] >= abs(metrics["sayo/token_bonus/mean"])


def test_an_estimator_of_verls_keeps_verls_advantages_and_gets_them_recorded(make, tmp_path):
    trainer, queue, batch = make(None)
    train_once(trainer, batch)
    (step,) = read_steps(tmp_path)
    for _, responses in step.prompts:
        rewards = torch.tensor([[response.facts["reward"]] for response in responses])
        want, _ = compute_grpo_outcome_advantage(rewards, torch.ones(N, 1), np.array(["a"] * N, object))
        assert [response.values["advantage"][0] for response in responses] == want[:, 0].tolist()
    keys = list(queue.rows["train"])
    assert not [name for name in queue.rows["train"][keys[0]] if name.startswith(WIRE_PREFIX)], "nothing was probed"


def test_prompts_are_submitted_as_verl_validates_with_the_sampling_of_training(make):
    trainer, _, _ = make(RegionMethod())
    for trainer.global_steps in (2, 3, 4):
        trainer.step({}, {})
    (batch,) = trainer.agent_loop_manager.submitted  # the policy after 2 steps, at the start of step 3
    assert tu.get_non_tensor_data(batch, "validate", False) is True
    assert tu.get_non_tensor_data(batch, "global_steps", 0) == 3
    assert list(batch["__rollout_n__"]) == [N, N]
    assert list(batch["agent_name"]) == [record_agent.NAME] * 2
    assert list(batch[record_agent.INNER]) == ["single_turn_agent"] * 2


def test_the_last_policy_is_recorded_after_training(make, tmp_path, monkeypatch):
    trainer, _, _ = make(RegionMethod())
    slept = []
    trainer.on_sample_end = lambda: slept.append(len(list(tmp_path.rglob("*.json"))))
    monkeypatch.setattr(trainer_base.PPOTrainer, "fit", lambda self, loops: None)
    trainer.fit(None)
    assert not slept, "no step was trained"
    trainer._recorder.started = True
    trainer.fit(None)
    assert [step.step for step in read_steps(tmp_path)] == [4]
    assert slept == [0], "the engine sleeps before the rows are probed"


def test_a_full_disk_ends_the_run_and_the_message_says_how_to_turn_recording_off(make, monkeypatch):
    trainer, _, batch = make(RegionMethod())

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write_step", full)
    with pytest.raises(SayoError, match=r"SAYO-A31: .*step.*No space left on device.*sayo.viz_every=0"):
        train_once(trainer, batch)


def test_rows_that_cannot_be_measured_or_generated_end_the_run(make):
    trainer, _, batch = make(RegionMethod())
    loops = trainer.agent_loop_manager
    for row in loops.rows:
        row["extra_info"]["boxes"] = [[[0.9, 0.9, 0.1, 0.1]]]
    with pytest.raises(SayoError, match=r"SAYO-A32: .*measured.*SAYO-.*sayo.viz_every=0"):
        train_once(trainer, batch)
    trainer, _, _ = make(RegionMethod())
    trainer.agent_loop_manager.rows = trainer.agent_loop_manager.rows[:N]  # the second prompt fails
    with pytest.raises(SayoError, match=r"SAYO-A32: .*generated.*held-out rows \[3\].*sayo.viz_every=0"):
        trainer.step({}, {})


def test_the_first_rows_with_an_image_are_chosen_and_those_with_a_box_for_a_method_that_needs_it():
    dataset = Dataset()
    assert choose_rows(dataset, 2, boxes=False) == [1, 2]
    assert choose_rows(dataset, 2, boxes=True) == [2, 3]
    assert choose_rows(dataset, 9, boxes=True) == [1, 2, 3]
    with pytest.raises(SayoError, match="SAYO-A32: no held-out row has an image"):
        choose_rows(dataset[:1], 1, boxes=False)


def test_the_agent_loop_of_a_row_gets_the_sampling_of_training(monkeypatch):
    """verl gives the sampling of validation; the loop is registered where verl looks it up."""
    seen = {}

    class Inner:
        def __init__(self, trainer_config, server_manager):
            seen["server"] = server_manager

        async def run(self, sampling_params, **kwargs):
            seen.update(kwargs, sampling=sampling_params)
            return "output"

    assert agent_loop._agent_loop_registry[record_agent.NAME]["_target_"].endswith("RecordedAgentLoop")
    monkeypatch.setattr(record_agent.hydra.utils, "instantiate", lambda target, **kwargs: target(**kwargs))
    monkeypatch.setitem(agent_loop._agent_loop_registry, "mine", Inner)
    rollout = {"temperature": 0.7, "top_p": 0.9, "top_k": 5}
    config = SimpleNamespace(config=SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout)))
    loop = record_agent.RecordedAgentLoop(trainer_config=config, server_manager="server")
    greedy = {"temperature": 0, "top_p": 1.0, "top_k": -1, "logprobs": True}
    done = loop.run(greedy, raw_prompt="text", **{record_agent.INNER: "mine"})
    assert asyncio.run(done) == "output"
    assert seen == {"server": "server", "raw_prompt": "text", "sampling": {**rollout, "logprobs": True}}
    assert greedy["temperature"] == 0
