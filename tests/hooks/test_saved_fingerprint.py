"""verl's own save, with our record beside it: a kill at any moment leaves a checkpoint that says what it is."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from support.saved import STATES, archive
from verl.trainer.ppo.v1 import trainer_base

from sayo_verl.errors import SayoError
from sayo_verl.launch.checkpoints import FINGERPRINT, TRACKER, judge_checkpoints, newest_complete

RECORD = {"schema": 1, "compared": {"seed": {"data.seed": 0}}, "saved": {}}


class Kill(BaseException):
    """The process ends here."""


class Trainer:
    """What ``_save_checkpoint`` reads of verl's trainer, with a worker group that writes small archives."""

    trainer_mode, use_critic, global_steps = "sync", False, 0

    def __init__(self, folder: Path, *, record: dict | None = RECORD, keep: int | None = None):
        sayo = {"fingerprint": json.dumps(record)} if record else {}
        self.config = OmegaConf.create(
            {
                "trainer": {
                    "default_local_dir": str(folder),
                    "default_hdfs_dir": None,
                    "max_actor_ckpt_to_keep": keep,
                },
                "actor_rollout_ref": {"actor": {}},
                "sayo": sayo,
            }
        )
        self.seen: list[str] = []
        self.actor_rollout_wg = SimpleNamespace(save_checkpoint=self.save_actor)
        self.train_dataloader = SimpleNamespace(state_dict=lambda: self.at("data") or {"position": self.global_steps})
        self.checkpoint_callback = SimpleNamespace(on_save=lambda **_: None)
        self.kill, self.saved = None, []

    def at(self, moment: str) -> None:
        self.seen.append(moment)
        if moment == self.kill:
            raise Kill(moment)

    def save_actor(self, path: str, _remote: object, _step: int, max_ckpt_to_keep: int | None) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        for state in STATES:
            file = Path(path) / f"{state}_world_size_1_rank_0.pt"
            file.write_bytes(archive()[:20])
            self.at(state)
            file.write_bytes(archive(str(self.global_steps)))
        self.saved.append(path)
        if max_ckpt_to_keep:  # as verl's CheckpointManager.register_checkpoint
            for old in self.saved[:-max_ckpt_to_keep]:
                shutil.rmtree(old)
            del self.saved[:-max_ckpt_to_keep]
        self.at("actor")

    def save(self, step: int, kill: str | None = None) -> None:
        self.global_steps, self.kill = step, kill
        trainer_base.PPOTrainer._save_checkpoint(self)


def steps(folder: Path) -> list[int]:
    return [c.step for c in judge_checkpoints(folder) if c.complete]


@pytest.fixture
def slow_tracker(monkeypatch):
    """A tracker that a kill leaves empty."""
    monkeypatch.setattr(trainer_base, "open", open, raising=False)

    def arm():
        def opened(name, mode):
            with open(name, mode):
                raise Kill("tracker")

        monkeypatch.setattr(trainer_base, "open", opened)

    return arm


def test_every_checkpoint_of_verl_has_its_record_and_its_step(tmp_path):
    trainer = Trainer(tmp_path)
    for step in (2, 4):
        trainer.save(step)
    records = [json.loads((tmp_path / f"global_step_{n}" / FINGERPRINT).read_text()) for n in (2, 4)]
    assert [record.pop("step") for record in records] == [2, 4]
    assert all(record.pop("written") for record in records)
    assert records == [RECORD, RECORD]
    assert sorted(file.name for file in (tmp_path / "global_step_2").iterdir()) == ["actor", "data.pt", FINGERPRINT]
    assert steps(tmp_path) == [2, 4]


def test_without_a_record_verl_saves_as_ever(tmp_path):
    Trainer(tmp_path, record=None).save(2)
    assert sorted(file.name for file in (tmp_path / "global_step_2").iterdir()) == ["actor", "data.pt"]
    trainer = Trainer(tmp_path, record=None)
    del trainer.config.sayo  # verl's own launcher
    trainer.save(4)
    assert (tmp_path / TRACKER).read_text() == "4"


@pytest.mark.parametrize("moment", [*STATES, "actor", "data"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path, moment):
    trainer = Trainer(tmp_path)
    trainer.save(2)
    with pytest.raises(Kill):
        trainer.save(4, kill=moment)
    assert (tmp_path / "global_step_4" / FINGERPRINT).exists()
    assert steps(tmp_path) == [2]
    assert (tmp_path / TRACKER).read_text() == "2"


def test_a_kill_in_the_tracker_leaves_both_complete(tmp_path, slow_tracker):
    trainer = Trainer(tmp_path)
    trainer.save(2)
    slow_tracker()
    with pytest.raises(Kill):
        trainer.save(4)
    assert steps(tmp_path) == [2, 4]
    assert (tmp_path / TRACKER).read_text() == ""


def test_with_one_checkpoint_to_keep_a_kill_can_leave_none(tmp_path):
    """Why ``max_actor_ckpt_to_keep=1`` is refused: verl deletes the old weights before it writes ``data.pt``."""
    for keep, left in ((1, None), (2, 2)):
        folder = tmp_path / str(keep)
        trainer = Trainer(folder, keep=keep)
        trainer.save(2)
        with pytest.raises(Kill):
            trainer.save(4, kill="data")
        newest = newest_complete(judge_checkpoints(folder))
        assert (newest and newest.step) == left


@pytest.mark.parametrize("moment", STATES[1:])
def test_a_kill_while_an_old_checkpoint_is_overwritten_does_not_leave_a_mixture(tmp_path, moment):
    """An earlier attempt went further: its step 4 is complete and is saved again. Its ``data.pt`` would remain."""
    Trainer(tmp_path).save(4)
    trainer = Trainer(tmp_path)
    trainer.save(2)
    with pytest.raises(Kill):
        trainer.save(4, kill=moment)
    (tmp_path / "global_step_4" / "actor" / f"{moment}_world_size_1_rank_0.pt").write_bytes(archive("whole"))
    assert steps(tmp_path) == [2]


def test_a_record_is_never_half_written(tmp_path, monkeypatch):
    trainer = Trainer(tmp_path)
    trainer.save(2)
    before = (tmp_path / "global_step_2" / FINGERPRINT).read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SayoError, match=r"X26: the disk is full: .*No space"):  # before verl writes anything
        trainer.save(2)
    assert (tmp_path / "global_step_2" / FINGERPRINT).read_text() == before
    assert trainer.seen.count("actor") == 1
