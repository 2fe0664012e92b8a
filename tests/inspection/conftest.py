"""Fixtures that several files of this room use."""

from pathlib import Path

import pytest
from support.family_models import TINY
from support.inspected import NAMES

from sayo_verl.inspection.model_view import Model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in made.items():
        TINY[name].build(folder)
    return made


@pytest.fixture(scope="session")
def models(folders) -> dict[str, Model]:
    return {name: Model(str(folder)) for name, folder in folders.items()}
