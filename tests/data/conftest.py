"""Fixtures that several files of this room use."""

import json
from pathlib import Path

import pytest
from support.gqa_files import GRAPHS, QUESTIONS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """GQA as it is published, two pictures of it."""
    (tmp_path / "train_sceneGraphs.json").write_text(json.dumps(GRAPHS))
    (tmp_path / "train_balanced_questions.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "images").mkdir()
    for image in GRAPHS:
        (tmp_path / "images" / f"{image}.jpg").write_bytes(b"jpeg " + image.encode())
    return tmp_path
