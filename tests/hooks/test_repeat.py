"""Rollouts that repeat: the seed of a request, and the order of a batch. The real stack: tests/test_e2e.py."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from sayo_verl.hooks.repeat import order_batches, place_of, seed_of, seed_requests

ROW = {
    "uid": "8d7c",
    "session_id": 0,
    "global_steps": 3,
    "index": 12,
    "data_source": "sayo/scenes",
    "raw_prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}],
}
SEED = 44414631594834180  # of ROW
OTHER = {
    "session_id": 1,
    "global_steps": 4,
    "index": 13,
    "data_source": "gqa",
    "raw_prompt": [{"role": "user", "content": "What shape?"}],
}


def config(repeatable=True):
    return OmegaConf.create(
        {"sayo": {"repeatable_rollouts": repeatable}, "actor_rollout_ref": {"rollout": {"seed": 5}}}
    )


def test_a_seed_is_the_same_in_every_process():
    assert seed_of(5, ROW, validate=False) == SEED


def test_a_seed_does_not_depend_on_the_random_uid_nor_on_numpys_types():
    same = {**ROW, "uid": "f00d", "index": np.int64(12), "global_steps": torch.tensor(3)}
    assert seed_of(5, same, validate=False) == seed_of(5, ROW, validate=False)


@pytest.mark.parametrize("name", OTHER)
def test_rows_steps_and_sessions_have_seeds_of_their_own(name):
    assert seed_of(5, {**ROW, name: OTHER[name]}, validate=False) != seed_of(5, ROW, validate=False)


def asked(*pictures):
    parts = [{"type": "image", **picture} for picture in pictures]
    content = [*parts, {"type": "text", "text": "Which?"}]
    return {**ROW, "index": 0, "raw_prompt": [{"role": "user", "content": content}]}


COLOURS = [
    {"image": Image.new("RGB", size, color)} for size, color in (((4, 2), "red"), ((4, 2), "blue"), ((2, 4), "red"))
]
STORED = [{"bytes": b"png one", "path": None, "image": object()}, {"bytes": b"png two", "path": None}]
NAMED = [{"image": "a.png"}, {"type": "video", "video": "a.mp4"}, {"type": "video", "video": ["1.png", "2.png"]}]


def test_one_question_about_other_pictures_has_seeds_of_its_own_without_an_index():
    shown = [[picture] for picture in [*COLOURS, *STORED, *NAMED]] + [[], COLOURS[:2], COLOURS[1::-1]]
    assert len({seed_of(5, asked(*pictures), validate=False) for pictures in shown}) == len(shown)


def test_a_picture_that_is_read_again_has_the_same_seed():
    again = [{"image": COLOURS[0]["image"].copy()}, {"bytes": b"png one", "path": "x", "image": object()}]
    for first, second in zip((COLOURS[0], STORED[0]), again, strict=True):
        assert seed_of(5, asked(first), validate=False) == seed_of(5, asked(second), validate=False)


def test_another_run_seed_and_validation_have_seeds_of_their_own():
    assert len({seed_of(5, ROW, validate=False), seed_of(6, ROW, validate=False), seed_of(5, ROW, validate=True)}) == 3


@given(st.integers(0, 2**31), st.integers(0, 10**9), st.integers(0, 10**6), st.integers(0, 10**4))
def test_a_seed_is_one_that_vllm_takes(run, index, step, session):
    row = {**ROW, "index": index, "global_steps": step, "session_id": session}
    assert 0 <= seed_of(run, row, validate=False) < 2**56


def worker(repeatable):
    """verl's agent loop worker with the guard; it returns the sampling parameters that a rollout gets."""

    class AgentLoopWorker:
        config: object

        async def _run_agent_loop(self, sampling_params, trajectory, *, agent_name, trace=True, **kwargs):
            return sampling_params

    seed_requests(SimpleNamespace(AgentLoopWorker=AgentLoopWorker))
    made = AgentLoopWorker()
    made.config = config(repeatable)
    return made


@pytest.mark.parametrize("repeatable", [True, False])
def test_a_request_gets_its_seed_in_a_copy_and_none_without_the_setting(repeatable):
    shared = {"temperature": 1.0}
    run = worker(repeatable)._run_agent_loop(shared, {"validate": False}, agent_name="single_turn_agent", **ROW)
    got = asyncio.run(run)
    assert shared == {"temperature": 1.0}
    assert got == ({"temperature": 1.0, "seed": seed_of(5, ROW, validate=False)} if repeatable else shared)


def trainer(repeatable):
    class PPOTrainer:
        global_steps = 3

        def _fetch_one_gen_batch(self):
            batch = TensorDict({"x": torch.zeros(2)}, batch_size=2)
            tu.assign_non_tensor_stack(batch, "uid", ["random", "names"])
            return batch

        def _balance_batch(self, batch, metrics):
            return batch

    order_batches(SimpleNamespace(PPOTrainer=PPOTrainer))
    made = PPOTrainer()
    made.config = config(repeatable)
    return made


def test_a_prompt_is_named_by_its_step_and_its_place_in_it():
    one = trainer(True)
    assert list(one._fetch_one_gen_batch()["uid"]) == ["00000003-00000000", "00000003-00000001"]
    assert list(one._fetch_one_gen_batch()["uid"]) == ["00000003-00000002", "00000003-00000003"]
    one.global_steps = 4
    assert list(one._fetch_one_gen_batch()["uid"]) == ["00000004-00000000", "00000004-00000001"]
    assert list(trainer(False)._fetch_one_gen_batch()["uid"]) == ["random", "names"]


@pytest.mark.parametrize("repeatable", [True, False])
def test_a_batch_is_sorted_by_place_and_session_whichever_rollout_ended_first(repeatable):
    ended = ["3-1_10_0", "3-0_1_0", "3-1_2_0", "3-0_0_0"]
    batch = KVBatchMeta(partition_id="train", keys=list(ended), tags=[{"was": key} for key in ended])
    out = trainer(repeatable)._balance_batch(batch, {})
    assert out.keys == (["3-0_0_0", "3-0_1_0", "3-1_2_0", "3-1_10_0"] if repeatable else ended)
    assert [tag["was"] for tag in out.tags] == out.keys


def test_a_place_is_read_from_verls_key():
    assert place_of("00000003-00000001_2_0") == ("00000003-00000001", 2, 0)
