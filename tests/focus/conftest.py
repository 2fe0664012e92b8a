"""Fixtures that several files of this room use."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.family_models import TINY
from support.focus_rows import FAMILIES, scene_rows

from sayo_verl.data.rows import schema_of


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    out = {}
    for name in FAMILIES:
        out[name] = tmp_path_factory.mktemp(name)
        TINY[name].build(out[name])
    return out


@pytest.fixture(scope="session")
def parquet(tmp_path_factory) -> Path:
    rows = [{k: v for k, v in row.items() if k != "_where"} for row in scene_rows(48)]
    for row in rows[::8]:
        row["extra_info"]["boxes"] = []
    file = tmp_path_factory.mktemp("rows") / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema_of(link=False)), file)
    return file
