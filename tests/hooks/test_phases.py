"""The trainer's phase, step and progress reach the board."""

import contextlib
from types import SimpleNamespace

import pytest

from sayo_verl.hooks import board, phases
from sayo_verl.hooks.contract import RUN_TOKEN


@pytest.fixture
def told(monkeypatch):
    told = []
    monkeypatch.setenv(RUN_TOKEN, "t")
    monkeypatch.setattr(phases, "STATE", phases.Phases())
    monkeypatch.setattr(board, "put", lambda topic, message: told.append((message["step"], message["phase"])))
    monkeypatch.setattr(board, "read", lambda topic: ["late"] * 3)
    return told


def trainer_module():
    @contextlib.contextmanager
    def marked_timer(name, timing_raw, **_):
        yield
        timing_raw[name] = 1.0

    class PPOTrainer:
        global_steps = 7

        def step(self, metrics, timing_raw):
            with module.marked_timer("gen", timing_raw, color="red"):
                pass
            return "batch"

        def _validate(self):
            return {"acc": 1.0}

    module = SimpleNamespace(marked_timer=marked_timer, PPOTrainer=PPOTrainer)
    phases.tell_timers(module)
    phases.tell_steps(module)
    return module


def test_a_phase_is_told_and_the_one_around_it_returns(told):
    module, metrics, timing = trainer_module(), {}, {}
    with module.marked_timer("step", timing):
        assert module.PPOTrainer().step(metrics, timing) == "batch"
    assert told == [(0, "step"), (7, "step"), (7, "gen"), (7, "step"), (7, "between")]
    assert timing == {"gen": 1.0, "step": 1.0}
    assert metrics == {"sayo/reward_timeouts": 3.0}
    assert module.PPOTrainer().step(metrics, timing)
    assert metrics == {"sayo/reward_timeouts": 0.0}, "new ones only"
    assert len(phases.STATE.seconds) == 1
    assert module.PPOTrainer()._validate() == {"acc": 1.0}
    assert told[-2:] == [(7, "validate"), (7, "between")]


def test_an_error_leaves_the_phase_that_raised_it(told):
    module = trainer_module()
    with pytest.raises(ValueError, match="boom"), module.marked_timer("update_actor", {}):
        raise ValueError("boom")
    assert told[-1] == (0, "update_actor")


def test_new_rollouts_are_progress(told, monkeypatch):
    monkeypatch.setattr(phases, "PROGRESS_S", 0.0)
    for seen in ((1, 0), (1, 0), (1, 1)):
        phases.STATE.rollouts(seen)
    assert len(told) == 2


def test_outside_a_run_of_the_launcher_nothing_is_told(told, monkeypatch):
    monkeypatch.delenv(RUN_TOKEN)
    metrics = {}
    trainer_module().PPOTrainer().step(metrics, {})
    assert not told
    assert not metrics
