"""The comparison of the loop with verl, on batches made up in the form in which a real run writes them."""

import dataclasses
import importlib
import json
import random
import sys
import types

import pytest
import torch
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from benchmarks.yardstick import agree, verl_runs
from benchmarks.yardstick.agree import compare, rollouts_of, verdict
from benchmarks.yardstick.loop import LoopConfig, credit_of, method_of
from benchmarks.yardstick.policy import new_policy
from benchmarks.yardstick.probed import signals
from benchmarks.yardstick.verl_runs import AgreeConfig, train_on_verl, validation, walks_of
from sayo_verl.methods import Signals, advantages
from sayo_verl.probe.statistics import Statistic
from sayo_verl.scenes.walk import WalkConfig, demonstration, sample_walk
from sayo_verl.tiny.prepared import prepare_walks

SCENES = WalkConfig(grid=3, steps=4, more_steps=2, n_train=4, n_val=1)
N, STEP = 4, 3


@pytest.fixture(scope="module")
def policy():
    return new_policy()


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    return walks_of(prepare_walks(tmp_path_factory.mktemp("rows"), SCENES).path)


@pytest.fixture(scope="module", params=["grpo", "sensitivity"])
def method(request):
    return method_of(LoopConfig(method=request.param))


@pytest.fixture
def batch(policy, walks, method):
    """Right and wrong responses of two walks, rows of the groups mixed, as verl's are."""
    names, rng = ["walk-train-1", "walk-train-3"], random.Random(0)
    prompts = policy.prompts([walks[name] for name in names])
    said = [demonstration(walks[name], rng, slip) for name in names for slip in (0, 0, 0.6, 0.9)]
    said[-1] = said[-1][:5]
    ids_BT = policy.encode(said)
    made = {
        "step": STEP,
        "id": [name for name in names for _ in range(N)],
        "uid": [f"uid of {name}" for name in names for _ in range(N)],
        "prompts": [ids for ids in prompts.ids for _ in range(N)],
        "responses": ids_BT,
        "response_mask": policy.mask(ids_BT).long(),
    }
    truths = policy.truths(prompts.walks, ids_BT)
    made["reward"] = torch.tensor([float(truth.rewarded) for truth in truths])
    made["reports"] = [{"walk_marks": truth.marks} for truth in truths]
    with torch.no_grad():
        made["old_log_probs"], made["entropy"] = policy.log_probs(prompts, ids_BT)
    rollouts, _ = rollouts_of(policy, made, walks)
    credit = credit_of(policy, method, rollouts, made["old_log_probs"], made["entropy"], STEP)
    made["advantages"], _ = advantages(made["reward"], rollouts.mask, made["uid"], credit)
    made["signals"] = None
    if method is not None:
        made["signals"] = signals(
            policy,
            prompts,
            ids_BT,
            method.needs(),
            log_probs=made["old_log_probs"],
            entropy=made["entropy"],
            uid=tuple(made["uid"]),
            correct=made["reward"],
            reports={},
            step=STEP,
        )
    return mixed(made, [5, 0, 1, 7, 2, 4, 3, 6])


def mixed(batch, order):
    """The same batch with its rows in another order."""
    out = {}
    for name, values in batch.items():
        if isinstance(values, torch.Tensor):
            out[name] = values[order]
        elif isinstance(values, list):
            out[name] = [values[row] for row in order]
        else:
            out[name] = values
    if out["signals"] is not None:
        given = out["signals"]
        out["signals"] = dataclasses.replace(
            given,
            **{
                name: getattr(given, name)[order]
                for name in ("response_mask", "entropy", "log_probs", "image_tokens", "region_tokens", "is_padding")
            },
            correct=given.correct[order],
            uid=tuple(given.uid[row] for row in order),
            counterfactuals={change: values[order] for change, values in given.counterfactuals.items()},
        )
    return out


def test_rows_are_the_walks_that_were_drawn(walks):
    assert sorted(walks) == [f"walk-train-{i}" for i in range(SCENES.n_train)]
    for name, walk in walks.items():
        drawn = sample_walk(random.Random(f"{SCENES.seed}/{name}/0"), SCENES)
        assert dataclasses.replace(walk, image=None) == dataclasses.replace(drawn, image=None, colours=())
        assert walk.image.tobytes() == drawn.image.tobytes()


def test_an_equal_batch_has_no_difference_in_any_order_of_its_rows(policy, walks, batch, method):
    found, loss = compare(policy, method, batch, walks)
    assert found["contrast"] == 2
    assert found["size"] > 0.5
    assert (found["from_grpo"] > 0.1) == (method is not None)
    assert found["advantages"] == found["tokens_over"] == found["rows_over"] == 0
    assert found["log_probs"] == found["entropy"] == 0
    assert found.get("from_verls_signals", 0.0) == 0
    assert verdict(found) == "agrees"
    loss.backward()
    assert policy.model.lm_head.weight.grad.abs().sum() > 0


def test_one_changed_advantage_is_found(policy, walks, batch, method):
    batch["advantages"][2, 3] += 1e-3
    found, _ = compare(policy, method, batch, walks)
    assert found["advantages"] == pytest.approx(1e-3, rel=1e-3)
    assert (found["tokens_over"], found["rows_over"]) == (1, 1)
    assert verdict(found) == "differs: the same signals, but other advantages"


@pytest.mark.parametrize("method", ["sensitivity"], indirect=True)
def test_an_image_changed_as_in_another_step_is_found(policy, walks, batch, method):
    found, _ = compare(policy, method, {**batch, "step": STEP + 1}, walks)
    (change,) = method.needs().interventions
    assert found["from_verls_signals"] == 0
    assert verdict(found) == f"differs: {change.key} are not the same in both"


def test_the_loop_answers_each_kind_of_held_out_walks_greedily(policy, tmp_path, monkeypatch):
    def steps_of(_policy, walks, seed):
        assert seed is None
        return {"acc": sum(walk.steps for walk in walks)}

    monkeypatch.setattr(agree, "evaluate", steps_of)
    held_out = walks_of(prepare_walks(tmp_path, SCENES).path, "val")
    found = agree._accuracy(policy, held_out, 7)
    assert found == {"step": 7, "sayo/walk": 4, "sayo/walk_more_steps": 6, "sayo/walk_new_pairs": 4}


def test_the_table_has_a_row_for_each_method():
    first = {"advantages": 2e-7, "log_probs": 3e-6, "tokens_over": 0, "size": 2.5, "reward": 0.125}
    first |= {"from_grpo": 0.0, "contrast": 12}
    shown = agree.table([{"method": "grpo", "steps_of_verl": [first, {}]}]).splitlines()
    assert shown[-1] == "| grpo | 2e-07 | - | 3e-06 | 0 | 2.5 | 0 | 12 | 0.125 |"


def test_an_advantage_outside_the_response_is_found(policy, walks, batch, method):
    row, token = (batch["response_mask"] == 0).nonzero()[0].tolist()
    batch["advantages"][row, token] = 0.5
    assert compare(policy, method, batch, walks)[0]["advantages"] == 0.5


@pytest.mark.parametrize("method", ["sensitivity"], indirect=True)
def test_what_verl_measured_otherwise_is_told_from_what_it_computed_otherwise(policy, walks, batch, method):
    (change,) = method.needs().interventions
    theirs = batch["signals"]
    noise = 9e-4 * (2 * torch.rand(theirs.log_probs.shape, generator=torch.Generator().manual_seed(0)) - 1)
    moved = {change: theirs.counterfactuals[change] + noise}
    batch["signals"] = dataclasses.replace(theirs, counterfactuals=moved)
    credit = method.credit(batch["signals"])
    batch["advantages"], _ = advantages(batch["reward"], batch["response_mask"].float(), batch["uid"], credit)
    found, _ = compare(policy, method, batch, walks)
    assert found["advantages"] > agree.TOLERANCE
    assert 0 < found["signals"][change.key] < agree.SAME
    assert found["from_verls_signals"] == 0
    assert verdict(found).startswith("agrees up to rounding")
    batch["advantages"] *= 1.01
    assert verdict(compare(policy, method, batch, walks)[0]) == "differs: the same signals, but other advantages"


def test_indices_are_compared_by_the_share_that_differ():
    index = Statistic("neighbour_index", (-1,), size=2)
    of_row = dict.fromkeys(("entropy", "log_probs"), torch.zeros(1, 4)) | dict.fromkeys(
        ("image_tokens", "region_tokens"), torch.ones(1)
    )
    both = [
        Signals(
            response_mask=torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
            statistics={index: values},
            is_padding=torch.zeros(1, dtype=torch.bool),
            uid=("a",),
            **of_row,
        )
        for values in (torch.zeros(1, 4, 2), torch.tensor([[[0.0, 7.0], [0.0, 0.0], [0.0, 0.0], [9.0, 9.0]]]))
    ]
    assert agree._signals(*both, torch.tensor([0])) == {index.key: pytest.approx(1 / 6)}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("id", "walk-train-99", "a group of several rows"),
        ("uid", "another", "groups of different sizes"),
        ("reports", {"walk_marks": "."}, "other marks"),
        ("prompts", torch.tensor([1, 2]), "a prompt of other tokens"),
        ("reward", torch.tensor(0.25), "another reward"),
        ("response_mask", torch.tensor(0), "another response mask"),
    ],
)
def test_a_row_that_cannot_be_matched_stops(policy, walks, batch, field, value, said):
    batch[field][0] = value
    with pytest.raises(ValueError, match=said):
        rollouts_of(policy, batch, walks)


def test_a_row_that_was_never_prepared_stops(policy, walks, batch):
    walks = {name: walk for name, walk in walks.items() if name != "walk-train-3"}
    with pytest.raises(ValueError, match="walk-train-3"):
        rollouts_of(policy, batch, walks)


def run_of(folder, steps):
    """What a finished run leaves."""
    (folder / "batches").mkdir(parents=True)
    (folder / "run").mkdir()
    lines = []
    for step in range(1, steps + 1):
        torch.save({"step": step}, folder / "batches" / f"step_{step}.pt")
        lines.append(
            {"step": step, "data": {"val-core/sayo/walk/acc/mean@1": 0.5} if step == steps else {"other": 1.0}}
        )
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_finished_run_is_not_made_again_and_its_validations_are_read(tmp_path, monkeypatch):
    run_of(tmp_path, 2)
    monkeypatch.setattr(verl_runs.subprocess, "run", None)
    found = train_on_verl(tmp_path, "grpo", tmp_path, tmp_path, AgreeConfig(steps=2))
    assert [batch["step"] for batch in found] == [1, 2]
    assert validation(tmp_path) == [{"step": 2, "sayo/walk": 0.5}]


def test_a_batch_with_signals_is_read_as_it_was_written(tmp_path, batch):
    run_of(tmp_path, 1)
    torch.save(batch, tmp_path / "batches" / "step_1.pt")
    (found,) = train_on_verl(tmp_path, "grpo", tmp_path, tmp_path, AgreeConfig(steps=1))
    assert torch.equal(found["advantages"], batch["advantages"])
    assert found["reports"] == batch["reports"]
    if batch["signals"] is not None:
        for change, values in batch["signals"].counterfactuals.items():
            assert torch.equal(found["signals"].counterfactuals[change], values)


def test_a_run_that_fails_or_writes_no_batch_ends_with_its_log(tmp_path, monkeypatch):
    for code in (0, 1):
        done = types.SimpleNamespace(returncode=code)
        monkeypatch.setattr(verl_runs.subprocess, "run", lambda *args, done=done, **kwargs: done)
        with pytest.raises(SystemExit, match=r"run of grpo failed.*train\.log"):
            train_on_verl(tmp_path, "grpo", tmp_path, tmp_path, AgreeConfig(steps=2))


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """``verl_batch`` as a run loads it; verl's trainer is as before when the test ends."""
    seen = []
    written = lambda _self, batch, _metrics: seen.append(sorted(p.name for p in tmp_path.glob("*/*"))) or batch  # noqa: E731
    monkeypatch.setattr(PPOTrainer, "_update_actor", written)
    monkeypatch.setenv("SAYO_BATCHES", str(tmp_path / "batches"))
    monkeypatch.delitem(sys.modules, "benchmarks.yardstick.verl_batch", raising=False)
    module = importlib.import_module("benchmarks.yardstick.verl_batch")
    return types.SimpleNamespace(module=module, seen=seen)


def test_a_batch_is_written_before_verl_trains_on_it(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder.module, "batch_of", lambda trainer, batch: {"step": 3, "of": (trainer, batch)})
    assert PPOTrainer._update_actor("the trainer", "the batch", {}) == "the batch"
    assert recorder.seen == [["step_3.pt"]]
    assert torch.load(tmp_path / "batches" / "step_3.pt") == {"step": 3, "of": ("the trainer", "the batch")}


def test_a_batch_has_the_fields_of_each_row_in_order(recorder, monkeypatch):
    def jagged(*rows):
        return torch.nested.nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    fields = {
        "responses": jagged([7, 8, 9], [7, 9]),
        "response_mask": jagged([1, 1, 1], [1, 1]),
        "prompts": jagged([1, 2], [1, 2, 3]),
        "rm_scores": jagged([0.0, 0.0, 1.0], [0.0, 0.0]),
        "uid": ["u", "v"],
        "extra_info": [{"id": "a"}, {"id": "b"}],
        **{name: jagged([0.1, 0.2, 0.3], [0.4, 0.5]) for name in ("old_log_probs", "entropy", "advantages")},
    }
    monkeypatch.setattr(recorder.module.store, "fetch", lambda batch, names: {name: fields[name] for name in names})
    monkeypatch.setattr(recorder.module.store, "reward_info", lambda batch: [{"acc": 1.0}, {"acc": 0.0}])
    found = recorder.module.batch_of(types.SimpleNamespace(global_steps=5), "the batch")
    assert (found["step"], found["id"], found["uid"], found["signals"]) == (5, ["a", "b"], ["u", "v"], None)
    assert found["responses"].tolist() == [[7, 8, 9], [7, 9, 0]]
    assert found["reward"].tolist() == [1.0, 0.0]
    assert [ids.tolist() for ids in found["prompts"]] == [[1, 2], [1, 2, 3]]
    assert torch.equal(found["advantages"], torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]))
