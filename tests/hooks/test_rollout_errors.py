"""Failed rollouts: which row, which error, how often; in the workers and in the trainer."""

import asyncio
import json
from types import ModuleType, SimpleNamespace

import pytest
from omegaconf import OmegaConf
from PIL import Image
from support.replay_queue import Queue, build
from verl.trainer.ppo.v1 import replay_buffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from sayo_verl.errors import SayoError
from sayo_verl.hooks import board, rollout_errors, step_guard
from sayo_verl.hooks.bad_images import LEFT_OUT, LeftOut
from sayo_verl.hooks.contract import RUN_TOKEN

ROW = {"data_source": "scenes", "extra_info": {"index": 7, "id": "train-7"}, "raw_prompt": []}
NAME = "row 7 of 'scenes' (extra_info.index; id train-7)"


@pytest.fixture
def messages(monkeypatch):
    """The run's board, as a dict."""
    stored: dict[str, str] = {}
    monkeypatch.setenv(RUN_TOKEN, "mine")
    monkeypatch.setattr(rollout_errors, "_total", {})
    monkeypatch.setattr(rollout_errors, "_errors", {})
    monkeypatch.setattr(board, "put", lambda topic, message: stored.update({topic: json.dumps(message)}))
    read = lambda topic: [json.loads(value) for key, value in stored.items() if key.startswith(topic)]  # noqa: E731
    monkeypatch.setattr(board, "read", read)
    return stored


def worker(run=None, reward=1.0):
    """A worker whose agent loop calls ``run`` with the fields of a row, and whose rewards are ``reward``."""

    class AgentLoopWorker:
        async def _run_agent_loop(self, sampling_params, trajectory, *, agent_name, **kwargs):
            return run(kwargs)

        async def _compute_score(self, outputs, kwargs):
            outputs[-1].reward_score = reward

    module = ModuleType("agent_loop")
    module.AgentLoopWorker = AgentLoopWorker
    rollout_errors.report_rollout_errors(module)
    return AgentLoopWorker()


def roll_out(one, row=ROW, *, validate=False):
    asyncio.run(one._run_agent_loop({}, {"step": 3, "validate": validate}, agent_name="a", **row))


def divide(row):
    return 1 / (row["extra_info"]["index"] - 7)


def test_an_error_is_noted_with_its_row_and_place_and_goes_on(messages):
    one = worker(divide)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            roll_out(one)
    roll_out(one, {**ROW, "extra_info": {"index": 8}})
    found = rollout_errors.failures("train")
    assert found.total == 3
    (error,) = found.errors
    assert (error.error, error.row, error.step, error.count) == ("ZeroDivisionError: division by zero", NAME, 3, 3)
    assert error.place.startswith(__file__)
    assert error.place.endswith("in divide")
    assert rollout_errors.failures("val").total == 0


def test_workers_are_added_up_and_verls_own_launcher_has_no_board(messages, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        roll_out(worker(divide), validate=True)
    key = next(iter(messages))
    messages[key + "0"] = messages[key]
    found = rollout_errors.failures("val")
    assert (found.total, found.errors[0].count) == (2, 2)
    monkeypatch.delenv(RUN_TOKEN)
    messages.clear()
    with pytest.raises(ZeroDivisionError):
        roll_out(worker(divide))
    assert not messages
    assert rollout_errors.failures("train").total == 0


@pytest.mark.parametrize(
    ("reward", "refused"), [(float("nan"), True), (float("inf"), True), (0.5, False), (None, False)]
)
def test_a_reward_that_is_not_finite_ends_its_rollout(reward, refused):
    def score():
        asyncio.run(worker(reward=reward)._compute_score([SimpleNamespace()], ROW))

    if not refused:
        return score()
    with pytest.raises(SayoError, match=r"^SAYO-A33: the reward function returned a score") as caught:
        score()
    assert caught.value.where == NAME


def test_an_image_that_cannot_be_decoded_is_named(messages, tmp_path):
    good, cut, text = (tmp_path / name for name in ("good.png", "cut.png", "text.png"))
    Image.effect_noise((64, 64), 50).save(good)
    cut.write_bytes(good.read_bytes()[:1000])
    text.write_text("<html>not found</html>")

    def prompt(*paths):
        return [{"role": "user", "content": [*[{"type": "image", "image": f"file://{path}"} for path in paths]]}]

    assert rollout_errors.broken_image(prompt(good)) is None
    assert rollout_errors.broken_image(prompt("http://x/y.png")) is None
    assert f"images[1] (file://{text}): UnidentifiedImageError" in str(rollout_errors.broken_image(prompt(good, text)))

    def decode(row):
        Image.open(cut).load()

    with pytest.raises(OSError, match="truncated"):
        roll_out(worker(decode), {**ROW, "raw_prompt": prompt(good, cut)})
    (error,) = rollout_errors.failures("train").errors
    assert error.image.startswith(f"images[1] (file://{cut}): OSError: ")


def trainer(body=None, *, bad_rows=0, rows=(), validation=None):
    """A trainer whose step calls ``body``, whose batches have these ``extra_info``, guarded as verl's."""

    class PPOTrainer:
        global_steps, config = 3, OmegaConf.create({"sayo": {"bad_rows": bad_rows}, "data": {"train_batch_size": 4}})

        def fit(self, agent_loop_manager):
            self.step({}, {})

        def step(self, metrics, timing_raw):
            return self._update_actor(metrics)

        def _update_actor(self, metrics):
            return body() if body else "batch"

        def _validate(self):
            return validation()

        def _fetch_one_gen_batch(self):
            return {"extra_info": list(rows)}

        def _init_dataloader(self):
            self.train_dataset = SimpleNamespace()

        def _build_replay_buffer(self):
            return SimpleNamespace()

    step_guard.guard_steps(SimpleNamespace(PPOTrainer=PPOTrainer))
    return PPOTrainer()


def fail(times, row=ROW, run=divide, **kwargs):
    one = worker(run)
    for _ in range(times):
        with pytest.raises(Exception, match=r"."):
            roll_out(one, row, **kwargs)


def test_failed_rollouts_are_counted_by_step_and_said_once(messages, capsys):
    one, found = trainer(), []
    for times in (2, 0, 3):
        fail(times)
        metrics: dict[str, float] = {}
        assert one.step(metrics, {}) == "batch"
        found.append(metrics)
    assert [m["sayo/failed_rollouts"] for m in found] == [2, 0, 3]
    assert [m["sayo/skipped_updates"] for m in found] == [0, 0, 0]
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert "2 of this step's rollouts failed and are left out (sayo/failed_rollouts counts them); ZeroDivision" in said
    assert f"first of {NAME} at {__file__}" in said


def nothing_left():
    raise RuntimeError("Sync replay buffer selected terminal groups with no materializable trajectories. Enable it")


def test_a_batch_whose_rollouts_all_failed_ends_with_the_first_error(messages):
    one = trainer(nothing_left)
    fail(3)
    fail(1, run=lambda row: {}["answer"])
    with pytest.raises(SayoError, match=r"^SAYO-X23: all rollouts of step 3 failed") as caught:
        one.fit(None)
    error = caught.value
    assert error.where.startswith(__file__)
    assert error.got == f"3 x ZeroDivisionError: division by zero, first of {NAME}; 1 x KeyError: 'answer'"
    assert "sync_refill_failed_groups" in error.fix
    assert error.__notes__ == ["in step 3, update of the actor"]


def test_an_error_after_many_messages_is_named_with_its_row_and_place(messages):
    def parse(row):
        raise ValueError(f"cannot parse {row['extra_info']['index']}")

    one = trainer(nothing_left)
    for n in range(2 * rollout_errors.MOST):
        fail(1, {**ROW, "extra_info": {"index": n}}, parse)
    step_guard._new(one, "train")
    fail(2, run=lambda row: {}["answer"])
    fail(1, {**ROW, "extra_info": {"index": 99}}, parse)
    with pytest.raises(SayoError, match=r"^SAYO-X23") as caught:
        one.step({}, {})
    assert caught.value.where.startswith(__file__)
    assert caught.value.got.startswith(f"2 x KeyError: 'answer', first of {NAME}; 1 x ValueError: cannot parse ")
    assert len(rollout_errors.failures("train").errors) == rollout_errors.MOST + 2


def test_an_image_error_after_many_messages_counts(messages, tmp_path):
    def parse(row):
        raise ValueError(f"cannot parse {row['extra_info']['index']}")

    for n in range(rollout_errors.MOST):
        fail(1, {**ROW, "extra_info": {"index": n}}, parse)
    one, paths = trainer(bad_rows=2), [tmp_path / f"{n}.png" for n in range(3)]
    for path in paths:  # rows that have no index, and so one name
        path.write_text("no image")
        prompt = [{"content": [{"type": "image", "image": str(path)}]}]
        fail(
            2, {"data_source": "vqa: a", "extra_info": {}, "raw_prompt": prompt}, lambda row: Image.open("/absent.png")
        )
    with pytest.raises(SayoError, match=r"^SAYO-X24: too many rows") as caught:
        one.step({}, {})
    assert str(paths[-1]) in caught.value.got


def test_an_error_of_a_second_worker_counts_once(messages):
    def post(worker, row, count, step):
        error = {"error": "KeyError: 'a'", "place": "p", "row": row, "step": step, "count": count, "kind": "KeyError"}
        board.put(f"failed_rollouts/train/{worker}", {"failed": count, "errors": [error]})

    one = trainer(bad_rows=2)
    post("b", "row 5", 8, 1)
    assert [error.count for error in step_guard._new(one, "train").errors] == [8]
    post("a", "row 9", 1, 2)
    (error,) = step_guard._new(one, "train").errors
    assert (error.count, error.row) == (1, "row 9")


def test_errors_of_verl_itself_stay_as_they_are(messages):
    fail(1)
    with pytest.raises(RuntimeError, match=r"^CUDA"):
        trainer(lambda: (_ for _ in ()).throw(RuntimeError("CUDA error"))).step({}, {})


def test_a_validation_names_the_error_of_its_rollouts(messages):
    def broken():
        raise IndexError("list index out of range")

    with pytest.raises(IndexError):
        trainer(validation=broken)._validate()
    fail(2, validate=True)
    assert trainer(validation=lambda: {"val/acc": 0.5})._validate() == {"val/acc": 0.5, "sayo/failed_rollouts/val": 2}
    with pytest.raises(SayoError, match=r"SAYO-X23: .*2 x ZeroDivisionError"):
        trainer(validation=broken)._validate()


def test_rows_that_the_data_set_left_out_are_counted_up_to_the_limit(messages, capsys):
    rows = [{"index": 1}, {"index": 2, LEFT_OUT: [LeftOut(7, NAME, "images[0] (x.png): OSError: cut")]}]
    one = trainer(bad_rows=1, rows=rows)
    assert one._fetch_one_gen_batch() == {"extra_info": [{"index": 1}, {"index": 2}]}  # as the file has it
    metrics: dict[str, float] = {}
    one.step(metrics, {})
    assert metrics["sayo/left_out_rows"] == 1
    assert (
        f"warning: left out {NAME}, 1 of 1 (sayo.bad_rows): images[0] (x.png): OSError: cut" in capsys.readouterr().err
    )
    rows[0][LEFT_OUT] = [LeftOut(7, NAME, "images[0] (x.png): OSError: cut")]  # the same row in the next epoch
    one._fetch_one_gen_batch()
    rows[0][LEFT_OUT] = [LeftOut(9, NAME, "images[0] (y.png): OSError: cut")]  # another row of the same name
    with pytest.raises(SayoError, match=r"^SAYO-X24: too many rows") as caught:
        one._fetch_one_gen_batch()
    assert caught.value.where == NAME
    assert caught.value.got.startswith("images[0] (y.png)")
    assert caught.value.wanted == "at most 1 such rows (sayo.bad_rows)"


def test_a_file_that_only_the_agent_loop_reads_ends_the_run_as_well(messages, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("no image")
    prompt = [{"content": [{"type": "image", "image": str(path)}]}]
    fail(4, {**ROW, "raw_prompt": prompt}, lambda row: Image.open(path))
    with pytest.raises(SayoError, match=r"^SAYO-X24: an image cannot be decoded") as caught:
        trainer().step({}, {})
    assert caught.value.where == NAME
    assert str(path) in caught.value.got
    metrics: dict[str, float] = {}
    trainer(bad_rows=2).step(metrics, {})
    assert (metrics["sayo/left_out_rows"], metrics["sayo/failed_rollouts"]) == (1, 4)


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_replacing_groups_that_all_fail_has_an_end(repo, messages, monkeypatch, mode):
    queue, groups = Queue(), []
    monkeypatch.setattr(replay_buffer, "tq", queue)

    def refill(n=1):
        for _ in range(n):
            groups.append(f"group{len(groups)}")
            queue.tags[groups[-1]] = {"is_prompt": True, "status": "failure", "global_steps": 1}
        assert len(groups) < 50, "no end"

    buffer = build(repo, refill, mode=mode, enable=False)
    buffer.sync_refill_failed_groups = True
    assert buffer._sayo_most_failed == 4  # two batches
    assert PPOTrainer._build_replay_buffer.__wrapped__
    fail(2)
    refill(2)
    with pytest.raises(SayoError, match=r"SAYO-X23: .* groups failed in step 1.*2 x ZeroDivisionError"):
        buffer.sample(global_steps=1, partition_id="train", batch_size=2)
