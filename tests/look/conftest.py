"""Fixtures that several files of this room use."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.family_models import TINY, patches_undone

from sayo_verl.look.observe import Observer
from sayo_verl.view import maps


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model."""

    @functools.cache
    def folder(name: str) -> Path:
        made = tmp_path_factory.mktemp(name)
        TINY[name].build(made)
        return made

    return folder


@pytest.fixture(scope="session")
def observer_of(folder_of) -> Callable[[str], Observer]:
    """A loaded tiny model of a family."""

    @functools.cache
    def observer(name: str) -> Observer:
        return Observer(str(folder_of(name)), device="cpu")

    return observer


@pytest.fixture(scope="module", autouse=True)
def _own_forwards():
    """What other files' engines changed in transformers is no part of a model here."""
    with patches_undone():
        yield


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch):
    """Maps as they were before they were packed, by their packed form."""
    raw = {}
    pack = maps.Packed.of.__func__

    def of(cls, maps_WV, levels=maps.LEVELS[0]):
        packed = pack(cls, maps_WV, levels)
        raw[id(packed)] = packed, np.array(maps_WV, dtype=np.float64)
        return packed

    monkeypatch.setattr(maps.Packed, "of", classmethod(of))
    return lambda packed: raw[id(packed)][1]
