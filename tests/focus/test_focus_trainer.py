"""What ends a training of the ``<Focus>`` token."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.family_models import TINY
from support.focus_rows import scene_rows

from sayo_verl.errors import SayoError
from sayo_verl.focus import trainer
from sayo_verl.focus.config import FocusConfig


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    folder, file = tmp_path / "model", tmp_path / "rows.parquet"
    TINY["qwen3_vl"].build(folder)
    pq.write_table(pa.Table.from_pylist(scene_rows(1)), file)
    monkeypatch.setattr(trainer, "TrainingArguments", lambda **_: SimpleNamespace(n_gpu=2))
    with pytest.raises(SayoError, match=r"SAYO-F17: .*got 2 GPUs, wanted one process per GPU"):
        trainer.anchor(folder, [file], tmp_path / "out", FocusConfig())


def test_a_loss_that_is_not_finite_ends_the_training(monkeypatch):
    output = SimpleNamespace(loss=torch.tensor(float("nan")), logits=torch.zeros(1, 2, 3))
    figures = {"divergence": torch.zeros(1)}
    monkeypatch.setattr(trainer, "forward_with_focus", lambda *_: (output, figures))
    stage = object.__new__(trainer.FocusTrainer)  # without a model
    stage._layers, stage._weight, stage._forbidden, stage.state = (0,), 1.0, (0,), SimpleNamespace(global_step=3)
    inputs = {trainer.FOCUS_KEY: None, "labels": torch.tensor([[-100, 1]])}
    with pytest.raises(SayoError, match=r"SAYO-F15: .*at step 3 \| got L_LM nan"):
        stage.compute_loss(None, inputs)
