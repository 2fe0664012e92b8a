"""separate_async: what is measured in a later update of a step is of the step's first weights, number by number.

verl's classes save and restore the weights of a real training worker; TransferQueue is a dictionary.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_module
from support.engine_rows import (
    fsdp1_on_cpu,
    log_prob_pass,
    make_rows,
    model_config,
    worker,
)
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.trainer.ppo.v1 import PPOTrainerSeparateAsync, trainer_base
from verl.utils import fsdp_utils
from verl.utils import tensordict_utils as tu

from sayo_verl.hooks import store
from sayo_verl.hooks.modes import SayoSeparateAsync
from sayo_verl.hooks.trainer import AttentionTrainer
from sayo_verl.methods.faithful import FaithfulMethod
from sayo_verl.probe.statistics import INTERVENTION_KEY, REQUEST_KEY, WIRE_PREFIX, log_probs_key

pytestmark = pytest.mark.usefixtures("process_group")
METHOD = FaithfulMethod()
(CHANGE,) = METHOD.needs().interventions
CHANGED = log_probs_key(CHANGE)
STEP = 3


class Queue:
    """TransferQueue's calls of the trainer, over a dictionary of rows."""

    def __init__(self, rows):
        self.keys = [f"u{i}_0_0" for i in range(len(rows))]
        extra = {"extra_fields": {"reward_extra_info": {"acc": 1.0}}}
        self.rows = {key: {**row, **extra} for key, row in zip(self.keys, rows, strict=True)}
        tags = [{"min_global_steps": 0, "max_global_steps": 0} for _ in rows]
        self.batch = KVBatchMeta(partition_id="train", keys=self.keys, tags=tags)

    def kv_batch_get(self, keys, partition_id, select_fields):
        data = tu.list_of_dict_to_tensordict(
            [{name: self.rows[key][name] for name in select_fields if name in self.rows[key]} for key in keys]
        )
        for name, value in data.items():
            if isinstance(value, torch.Tensor) and not value.is_nested:
                data[name] = torch.nested.as_nested_tensor(list(value.unbind()), layout=torch.jagged)
        return data

    def kv_batch_put(self, keys, partition_id, fields):
        for name in fields.keys():
            if isinstance(fields[name], torch.Tensor):
                for key, value in zip(keys, fields[name].unbind(), strict=True):
                    self.rows[key][name] = value.clone()
        return self.batch


class Workers:
    """A worker group of one process: verl's saving of weights, and its log-prob pass."""

    workers = (None,)

    def __init__(self, built, rows, queue, strategy):
        self.built, self.rows, self.queue = built, rows, queue
        self.saver = object.__new__(DetachActorWorker)
        self.saver.config, self.saver.actor = SimpleNamespace(actor=SimpleNamespace(strategy=strategy)), built
        self.saver._strategy_handlers = None
        self.save_model_to_cpu = self.saver.save_model_to_cpu
        self.restore_model_from_cpu = self.saver.restore_model_from_cpu
        self.clear_cpu_model = self.saver.clear_cpu_model

    def compute_log_prob(self, batch):
        info = batch.extra_info
        change = {INTERVENTION_KEY: info[INTERVENTION_KEY]} if INTERVENTION_KEY in info else {}
        output = log_prob_pass(
            self.built, self.rows, info.get(REQUEST_KEY), calculate_entropy=info["calculate_entropy"], **change
        )
        tensors = {name: output[name] for name in output.keys() if isinstance(output[name], torch.Tensor)}
        return self.queue.kv_batch_put(self.queue.keys, "train", TensorDict(tensors, batch_size=len(self.rows)))


class AttentionInFront(AttentionTrainer, PPOTrainerSeparateAsync):
    """The other order of the bases."""

    base_mode = "separate_async"


@pytest.fixture(scope="module")
def config():
    with initialize_config_module("sayo_verl.config", version_base=None):
        return compose(
            "sayo_trainer",
            overrides=["actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.calculate_log_probs=False"],
        )


def make_trainer(cls, config, group):
    trainer = object.__new__(cls)  # the real methods without verl's start-up
    trainer.config, trainer.actor_rollout_wg, trainer.global_steps = config, group, STEP
    trainer._method, trainer._needs, trainer._pending = METHOD, METHOD.needs(), None
    trainer._request = trainer._needs.statistics
    trainer._thread = ThreadPoolExecutor(max_workers=1)
    return trainer


def measured(built, rows):
    """All that a step measures, with the weights that the worker has now, by the workers' call itself."""
    output = log_prob_pass(built, rows, METHOD.needs().statistics.to_wire())
    change = {INTERVENTION_KEY: {**CHANGE.to_wire(), "coverage": 0.5, "step": STEP}}
    other = log_prob_pass(built, rows, None, calculate_entropy=False, **change)
    names = [name for name in output.keys() if name.startswith(WIRE_PREFIX) and "seconds" not in name]
    values = {name: output[name] for name in ("log_probs", "entropy", *names)}
    values[CHANGED] = other[CHANGED]
    return {name: [value.clone() for value in nested.unbind()] for name, nested in values.items()}


def same(got, want):
    """Bit for bit; positions of the prompt are nan."""
    return all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(got, want, strict=True))


def weights(built):
    return [parameter.detach().clone() for parameter in built.engine.module.parameters()]


def train(built):
    """Change the weights in place, as an optimizer does."""
    with torch.no_grad():
        for parameter in built.engine.module.parameters():
            parameter.mul_(1.05)


def two_updates(cls, config, policy, monkeypatch, strategy):
    """Run the log-prob passes of two updates of one step.

    Returns:
        What the first weights give, what the current ones give, what the second update measured and its signals.
    """
    with ExitStack() as stack:
        if strategy == "fsdp":
            stack.enter_context(fsdp1_on_cpu())
        model = model_config(policy, packed=True)
        built, rows = worker(model, dynamic=False, strategy=strategy), make_rows(model.processor)
        queue = Queue(rows)
        for module in (store, trainer_base):
            monkeypatch.setattr(module, "tq", queue)
        trainer = make_trainer(cls, config, Workers(built, rows, queue, strategy))
        first = measured(built, rows)
        trainer.local_trigger_step = 0
        trainer._compute_old_log_prob(queue.batch, {})
        train(built)
        current, now = measured(built, rows), weights(built)
        trainer.local_trigger_step = 1
        trainer._compute_old_log_prob(queue.batch, {})
        assert all(torch.equal(a, b) for a, b in zip(weights(built), now, strict=True)), "the update is lost"
    second = {name: [queue.rows[key][name] for key in queue.keys] for name in first}
    return first, current, second, trainer._pending


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_a_later_update_measures_the_first_weights_of_the_step(config, random_policy, monkeypatch, strategy):
    first, current, second, pending = two_updates(SayoSeparateAsync, config, random_policy, monkeypatch, strategy)
    constant = {WIRE_PREFIX + "image_tokens", WIRE_PREFIX + "region_tokens"}
    for name, want in first.items():
        assert same(current[name], want) == (name in constant), f"{name} does not depend on the weights"
        if name != "entropy":  # verl stores it for the response only
            assert same(second[name], want), f"{name} is not of the old policy"
    signals = {name: name for name in ("log_probs", "entropy")} | {CHANGED: CHANGED}
    for name, field in signals.items():
        for n, length in enumerate(pending.signals.response_mask.sum(-1)):
            of_batch = pending.signals.counterfactual(CHANGE) if name == CHANGED else getattr(pending.signals, field)
            signal = of_batch[n, :length]
            sent = first[name][n]
            wanted = sent if name == CHANGED else sent[-length - 1 : -1]  # verl sends whole sequences
            assert torch.equal(signal, wanted), f"the method gets another {name}"


def test_attention_in_front_of_verls_trainer_would_measure_the_current_weights(config, random_policy, monkeypatch):
    """Why ``AttentionTrainer`` is the last of the bases, and that the test above would find the other order."""
    first, current, second, _ = two_updates(AttentionInFront, config, random_policy, monkeypatch, "fsdp2")
    assert same(second["log_probs"], first["log_probs"])
    assert same(second[CHANGED], current[CHANGED])
    assert not same(second[CHANGED], first[CHANGED])


@pytest.mark.parametrize("merged", [False, True])
def test_verl_sends_an_adapter_to_other_devices_only_if_it_is_merged(random_policy, merged):
    """What ``separate_async`` sends to its rollouts; launch/mode_check.py refuses the other setting."""
    model = model_config(random_policy, packed=True, lora_rank=4)
    model.lora["merge"] = merged
    engine = worker(model, dynamic=False).engine
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    sent, base = dict(engine.get_per_tensor_param()[0]), dict(engine.module.named_parameters())
    of_layer = "language_model.layers.0.self_attn.q_proj."
    (sent_weight,) = [value for name, value in sent.items() if of_layer in name]
    (weight,) = [value for name, value in base.items() if of_layer in name and "lora" not in name]
    assert not [name for name in sent if "lora" in name]
    assert torch.equal(sent_weight, weight.full_tensor()) != merged


def test_the_copy_of_saved_weights_is_still_needed(random_policy):
    """verl returns weights on the CPU themselves; the guard copies them."""
    module = worker(model_config(random_policy, packed=True), dynamic=False).engine.module
    name, parameter = next(iter(module.named_parameters()))
    address = parameter._local_tensor.data_ptr()
    of_verl, guarded = fsdp_utils.fsdp2_sharded_save_to_cpu.__wrapped__, fsdp_utils.fsdp2_sharded_save_to_cpu
    assert of_verl(module)[0][name][0].data_ptr() == address, "verl copies them now: the guard can go"
    assert guarded(module)[0][name][0].data_ptr() != address
    assert torch.equal(guarded(module)[0][name][0], parameter._local_tensor)
