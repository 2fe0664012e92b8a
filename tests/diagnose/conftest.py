"""A handful of drawn scenes, and their responses by a tiny model."""

from pathlib import Path

import pytest

from sayo_verl.scenes import SceneConfig
from sayo_verl.tiny.prepared import prepare_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared data with a few validation rows."""
    root = tmp_path_factory.mktemp("scenes")
    return prepare_scenes(root, SceneConfig(n_train=4, n_val=6)).path
