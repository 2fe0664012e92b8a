"""Which checkpoints of a folder are complete: what a kill, a full disk or verl's retention leaves."""

import shutil
from pathlib import Path

import pytest
import torch
from support.saved import archive, save

from sayo_verl.launch.checkpoints import Expected, judge_checkpoints, newest_complete, steps_lost, write_fingerprint

ACTOR = "actor/model_world_size_1_rank_0.pt"
SAVED = {"saved": {"devices": 1, "parts": ["actor", "critic"], "fsdp": True, "queue": False}}
QUEUED = {"saved": {"devices": 1, "parts": ["actor"], "fsdp": True, "queue": True}}


def judged(folder: Path, expected: Expected | None = None) -> dict[int, str]:
    return {c.step: str(c).partition(": ")[2] for c in judge_checkpoints(folder, expected)}


def test_complete_ones_are_listed_by_number(tmp_path):
    folder = save(tmp_path, 10, 2, 30, tracker=10)
    (folder / "global_step_4_old").mkdir()
    assert judged(folder) == {2: "complete", 10: "complete, the tracker names it", 30: "complete"}
    assert newest_complete(judge_checkpoints(folder)).step == 30
    assert judge_checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize("lost", [ACTOR, "data.pt"])
@pytest.mark.parametrize("left", [None, 0, 1, 0.5])
def test_a_file_that_is_missing_empty_or_truncated_is_named(tmp_path, lost, left):
    file = save(tmp_path, 2, 4) / "global_step_4" / lost
    whole = archive()
    file.unlink() if left is None else file.write_bytes(whole[: int(left * len(whole))] if left != 1 else whole[:-1])
    what = "missing" if left is None else "truncated" if left else "empty"
    assert judged(tmp_path) == {2: "complete", 4: f"{lost} {what}"}
    assert newest_complete(judge_checkpoints(tmp_path)).step == 2


def test_what_torch_cannot_load_is_damaged_at_every_length(tmp_path):
    file = save(tmp_path, 2) / "global_step_2" / "data.pt"
    torch.save({"state": torch.ones(500)}, file)
    whole = file.read_bytes()
    assert judged(tmp_path) == {2: "complete"}
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        file.write_bytes(whole[:length])
        assert judged(tmp_path) == {2: "data.pt truncated" if length else "data.pt empty"}


def test_a_critic_and_the_prompts_in_flight_belong_to_it(tmp_path):
    folder = save(tmp_path, 2, 4, parts=("actor", "critic"))
    shutil.rmtree(folder / "global_step_4" / "critic")
    (folder / "global_step_4" / "critic").mkdir()
    assert judged(folder)[4] == "critic/model_world_size_1_rank_0.pt missing and 2 more"
    (folder / "global_step_4" / "critic").rmdir()
    assert judged(folder)[4] == "complete"  # nothing says that there was one
    assert "critic/" in judged(folder, Expected(parts=("actor", "critic")))[4]
    assert judged(folder, Expected(queue=True))[2] == "transfer_queue missing"


def test_prompts_in_flight_are_of_the_same_save(tmp_path):
    """verl saves them after ``data.pt``: those of an abandoned attempt must not complete a new one."""
    folder = save(tmp_path, 4, fingerprint=QUEUED) / "global_step_4"
    (folder / "transfer_queue").mkdir()
    assert judged(tmp_path) == {4: "transfer_queue/metadata.json missing"}
    (folder / "transfer_queue" / "metadata.json").write_text("{}")
    assert judged(tmp_path) == {4: "complete"}
    write_fingerprint(folder, QUEUED)
    (folder / "data.pt").write_bytes(archive())
    assert judged(tmp_path) == {4: "transfer_queue missing"}


def test_the_fingerprint_says_what_belongs_to_it(tmp_path):
    save(tmp_path, 2, fingerprint=SAVED)
    assert judged(tmp_path) == {2: "critic/model_world_size_1_rank_0.pt missing and 2 more"}
    (tmp_path / "global_step_2" / "sayo.json").write_text("{")
    assert judged(tmp_path) == {2: "complete"}


def test_every_rank_counts(tmp_path):
    folder = save(tmp_path, 2, world=4)
    assert judge_checkpoints(folder)[0].devices == {4}
    (folder / "global_step_2" / "actor" / "optim_world_size_4_rank_3.pt").unlink()
    assert judged(folder) == {2: "actor/optim_world_size_4_rank_3.pt missing"}
    assert judged(folder, Expected(devices=2))[2].startswith("actor/model_world_size_2_rank_0.pt missing and 5 more")


def test_a_checkpoint_that_verls_retention_removed_is_no_damage(tmp_path):
    """verl deletes ``actor`` and leaves ``data.pt``; an interrupted save has ``actor`` and no ``data.pt``."""
    folder = save(tmp_path, 2, 4, 6, tracker=2)
    shutil.rmtree(folder / "global_step_2" / "actor")  # max_actor_ckpt_to_keep=1, killed before the tracker of 4
    (folder / "global_step_4" / "data.pt").unlink()
    found = judge_checkpoints(folder)
    assert [(c.removed, c.complete) for c in found] == [(True, False), (False, False), (False, True)]
    assert "removed" in str(found[0])
    assert newest_complete(found[:2]) is None


def test_the_steps_after_the_newest_complete_one_are_lost(tmp_path):
    found = judge_checkpoints(save(tmp_path, 2, 4))
    assert (steps_lost(found, 7), steps_lost(found, 4), steps_lost([], 3)) == (3, 0, 3)


def test_the_files_of_another_strategy_are_not_checked(tmp_path):
    folder = save(tmp_path, 2)
    shutil.rmtree(folder / "global_step_2" / "actor")
    (folder / "global_step_2" / "actor" / "dist_ckpt").mkdir(parents=True)
    assert judged(folder) == {2: "complete"}
