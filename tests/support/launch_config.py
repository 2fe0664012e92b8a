"""Configurations of a run as the launcher composes them, files that they name, and their refusals."""

import copy
import functools
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image

import sayo_verl.launch.job  # noqa: F401 (registers the resolvers of configs/job)
from sayo_verl.errors import SayoError
from sayo_verl.launch.preflight import preflight
from sayo_verl.launch.unread_keys import KWARGS

MESSAGE = re.compile(r"SAYO-[A-Z]\d\d: .+ \| at .+ \| (.* \| )?fix: .+")


ROWS = 16  # of a file: at least data.train_batch_size


def write_rows(
    path: Path,
    *,
    boxes: list | None,
    question: str = "What colour?",
    source: str = "sayo/scenes",
    truth: Any = "red",
    rows: int = ROWS,
) -> Path:
    png = io.BytesIO()
    Image.new("RGB", (8, 8), (zlib.crc32(path.name.encode()) % 256, 0, 0)).save(png, "PNG")  # held out by name
    row = {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"<image>{question}"}],
        "images": [{"bytes": png.getvalue(), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 0} if boxes is None else {"index": 0, "boxes": boxes},
    }
    pq.write_table(pa.Table.from_pylist([row] * rows), path)
    return path


def files(folder: Path, **of_rows: Any) -> dict[str, str]:
    """Training and validation files whose rows have a box; ``of_rows`` as in ``write_rows``."""
    boxes, n = [[[0.0, 0.0, 0.5, 0.5]]], len(list(folder.iterdir()))
    return {
        f"data.{split}_files": str(write_rows(folder / f"{split}-{n}.parquet", boxes=boxes, **of_rows))
        for split in ("train", "val")
    }


def write_model(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(config: DictConfig, code: str, *, dry_run: bool = False) -> SayoError:
    with pytest.raises(SayoError) as caught:
        preflight(config, dry_run=dry_run)
    assert caught.value.code == code
    assert MESSAGE.fullmatch(str(caught.value)), str(caught.value)
    return caught.value


def add(config: DictConfig, key: str, value: Any) -> DictConfig:
    """As ``+key=value`` does on the command line."""
    with open_dict(config):
        OmegaConf.update(config, key, value, force_add=True)
    return config


def with_kwargs(config: DictConfig, **kwargs: Any) -> DictConfig:
    """Settings of the reward function."""
    for key, value in kwargs.items():
        add(config, f"{KWARGS}.{key}", value)
    return config


def composed(repo: Path, *overrides: str) -> DictConfig:
    """The configuration that `python -m sayo_verl.main_ppo --config-dir configs` composes; each is composed once."""
    return copy.deepcopy(_composed(repo, overrides))


@functools.cache
def _composed(repo: Path, overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(repo / "sayo_verl" / "config"), version_base=None):
        return compose(
            "sayo_trainer",
            overrides=[f"hydra.searchpath=[pkg://verl.trainer.config,file://{repo / 'configs'}]", *overrides],
        )
