"""Images that cannot be decoded, updates that are skipped and checkpoints that cannot be saved are named."""

import errno
import io
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sayo_verl.errors import SayoError
from sayo_verl.hooks import board, skipped_updates, store
from sayo_verl.hooks.bad_images import ALLOWED, LEFT_OUT, name_bad_images, take_left_out
from sayo_verl.hooks.contract import RUN_TOKEN
from sayo_verl.hooks.save_errors import guard_save, save_error
from sayo_verl.methods import Needs
from sayo_verl.methods.random_signals import random_signals
from sayo_verl.probe.statistics import Statistic, StatisticsRequest
from sayo_verl.report.causes import describe_exception


def png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return file.getvalue()


class RLHFDataset:
    """As verl's: opens images and does not decode them."""

    def __init__(self, images):
        rows = enumerate(images)
        self.dataframe = [{"data_source": "s", "extra_info": {"index": i}, "bytes": image} for i, image in rows]

    def __len__(self):
        return len(self.dataframe)

    def __getitem__(self, item):
        row = dict(self.dataframe[item])
        image = {"type": "image", "image": Image.open(io.BytesIO(row.pop("bytes"))), "path": f"{item}.png"}
        return {**row, "raw_prompt": [{"content": [image]}]}


name_bad_images(SimpleNamespace(RLHFDataset=RLHFDataset))
GOOD, CUT, TEXT = png(), png()[:1000], b"<html>"


def test_a_row_with_a_bad_image_is_named_before_a_worker_of_the_loader_pickles_it():
    data = RLHFDataset([GOOD, CUT, TEXT])
    assert data[0]["extra_info"] == {"index": 0}
    with pytest.raises(SayoError, match=r"^SAYO-X24: an image cannot be decoded \| at row 1 of 's' ") as caught:
        data[1]
    assert caught.value.got.startswith("images[0] (1.png): OSError: ")
    with pytest.raises(SayoError, match=r"row 2 of 's' .*UnidentifiedImageError"):
        data[2]
    loader = DataLoader(data, batch_size=1, num_workers=1, collate_fn=list, multiprocessing_context="fork")
    with pytest.raises(RuntimeError) as raised:
        list(loader)
    assert describe_exception(raised.value)[0].startswith("SAYO-X24: an image cannot be decoded | at row 1 of 's' ")


def test_the_next_good_row_takes_the_place_of_a_bad_one_and_says_so():
    data = RLHFDataset([GOOD, CUT, TEXT])
    setattr(data, ALLOWED, 2)
    row = data[1]
    assert row["extra_info"]["index"] == 0
    left_out = row["extra_info"][LEFT_OUT]
    assert [(row.position, row.name.split(" (")[0]) for row in left_out] == [(1, "row 1 of 's'"), (2, "row 2 of 's'")]
    assert take_left_out({"extra_info": [row["extra_info"], {"index": 4}]}) == left_out
    assert row["extra_info"] == {"index": 0}
    assert data.dataframe[0]["extra_info"] == {"index": 0}
    setattr(data, ALLOWED, 1)
    with pytest.raises(SayoError, match=r"row 2 of 's'.*at most 1 such rows"):
        data[1]


@pytest.fixture
def engine(monkeypatch):
    """verl's rule: an update whose gradient is not finite is skipped."""
    stored = {}
    monkeypatch.setenv(RUN_TOKEN, "mine")
    monkeypatch.setattr(skipped_updates, "_skipped", Counter())
    monkeypatch.setattr(board, "put", lambda topic, message: stored.update({topic: message}))
    monkeypatch.setattr(board, "read", lambda topic: [m for t, m in stored.items() if t.startswith(topic)])

    class FSDPEngine:
        module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))

        def optimizer_step(self):
            grads = [parameter.grad for parameter in self.module.parameters()]
            return float(torch.stack([grad.norm() for grad in grads]).norm())

    skipped_updates.count_skipped_updates(SimpleNamespace(FSDPEngine=FSDPEngine))
    actor, critic = FSDPEngine(), FSDPEngine()

    def step(value, engine=actor):
        for parameter in engine.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        engine.module[1].weight.grad[0, 1] = value
        return engine.optimizer_step()

    step.critic = critic
    return step


def test_skipped_updates_of_two_engines_of_a_process_are_added(engine):
    nan = float("nan")
    for given in (nan, 1.0, nan):
        engine(given)
    assert skipped_updates.skipped_updates() == 2
    engine(nan, engine.critic)
    assert skipped_updates.skipped_updates() == 3


def test_skipped_updates_are_those_of_all_engines_whatever_the_number_of_processes(monkeypatch):
    told = [{"Actor": 2}, {"Actor": 2}, {"Actor": 1}, {"Critic": 3}, {"Critic": 3}]  # one rank has not written yet
    monkeypatch.setenv(RUN_TOKEN, "mine")
    monkeypatch.setattr(board, "read", lambda topic: [{"skipped": counts} for counts in told])
    assert skipped_updates.skipped_updates() == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skipped_updates_are_counted_and_the_third_in_a_row_names_the_parameter(engine, value):
    for given in (1.0, value, value, 1.0, value, value):
        engine(given)
    assert skipped_updates.skipped_updates() == 4
    with pytest.raises(SayoError, match=r"^SAYO-A34: the gradient was not finite in 3 updates in a row") as caught:
        engine(value)
    assert caught.value.where == "1.weight"
    assert caught.value.got.endswith("5 skipped updates of this process since the start")


FULL = OSError(errno.ENOSPC, "No space left on device", "/x/model.pt")


@pytest.mark.parametrize(
    ("error", "free", "named"),
    [
        (FULL, 2**40, "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2**40, "the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only file system"), 2**40, "the file system is read-only"),
        (RuntimeError("[enforce fail at inline_container.cc:862] . unexpected pos 2156160 vs 2156048"), 0, "is full"),
        (RuntimeError("[enforce fail at inline_container.cc:862] . unexpected pos 2156160 vs 2156048"), 2**40, None),
        (RuntimeError("basic_ios::clear: iostream error"), 0, "is full"),
        (RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"), 2**40, "is full"),
        (RuntimeError("CUDA error"), 0, None),
    ],
)
def test_an_error_of_the_disk_is_told_from_others(tmp_path, monkeypatch, error, free, named):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    found = save_error(error, tmp_path / "checkpoints", 4, b"2")
    if named is None:
        assert found is None
        return
    assert found.code == "X26"
    assert named in found.what
    assert found.what.endswith("the checkpoint of step 4 was not saved, checkpoint 2 stays")
    assert found.where.endswith("checkpoints/global_step_4")


@pytest.mark.parametrize("before", [None, "2"])
def test_a_tracker_that_could_not_be_written_gets_its_text_back(tmp_path, before):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    if before:
        tracker.write_text(before)

    class PPOTrainer:
        config, global_steps = SimpleNamespace(trainer=SimpleNamespace(default_local_dir=tmp_path)), 4
        fails = True

        def _save_checkpoint(self):
            tracker.write_text("" if self.fails else "4")
            if self.fails:
                raise FULL

    guard_save(SimpleNamespace(PPOTrainer=PPOTrainer))
    with pytest.raises(SayoError, match=r"^SAYO-X26: the disk is full") as caught:
        PPOTrainer()._save_checkpoint()
    assert ("there is no earlier checkpoint" in caught.value.what) is (before is None)
    assert not tracker.exists() if before is None else tracker.read_text() == before
    PPOTrainer.fails = False
    PPOTrainer()._save_checkpoint()
    assert tracker.read_text() == "4"
    assert [path.name for path in tmp_path.iterdir()] == [tracker.name]


def test_a_number_that_is_not_finite_is_named_by_layer_token_and_row_of_data(monkeypatch):
    signals = random_signals(Needs(StatisticsRequest((Statistic("region_mass", layers=(-1,)),))), 3, 12, 9)
    ((statistic, values),) = signals.statistics.items()
    (row, token), *_ = (signals.response_mask.bool() & (signals.image_tokens > 0)[:, None]).nonzero().tolist()
    values[row, token] = float("nan")
    with pytest.raises(SayoError, match=r"^SAYO-A03: 1 of \d+ values of region_mass.*\(layer -1\) are not") as caught:
        signals.check()
    assert statistic.layers == (-1,)
    assert caught.value.where == f"row {row} of the batch, response token {token}; 1 such rows"
    batch = SimpleNamespace(partition_id="train", keys=[f"u_{n}_0" for n in range(12)], tags=[{}] * 12)
    data = {"extra_info": [{"index": 4}], "data_source": ["scenes"]}
    monkeypatch.setattr(store, "fetch", lambda one, fields: data if one.keys == [f"u_{row}_0"] else None)
    named = store.name_row(caught.value, batch)
    assert named.where == f"{caught.value.where}: row 4 of 'scenes' (extra_info.index), rollout {row}"
    assert store.name_row(SayoError("A01", "x", where="y", fix="z"), batch).where == "y"
