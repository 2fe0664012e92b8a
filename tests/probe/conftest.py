"""Fixtures that several files of this room use."""

import importlib

import pytest
from support.fast_cases import QUICK
from support.tapped import rotary_functions

from sayo_verl.probe import fast, kernels


@pytest.fixture
def rotary_functions_stay():
    """A tap puts every function back that it replaced."""
    before = rotary_functions()
    assert all(f.__module__.startswith("transformers.") for f in before.values())
    yield
    assert rotary_functions() == before


@pytest.fixture
def interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Kernels that Triton's interpreter runs, whoever imported Triton before; not for tests that name `compiled`."""
    if "compiled" in request.fixturenames:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    importlib.reload(kernels)
    assert kernels.INTERPRETED is ("compiled" not in request.fixturenames)
    yield
    monkeypatch.undo()
    importlib.reload(kernels)


@pytest.fixture
def compiled():
    """Asks for kernels as they are without TRITON_INTERPRET."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fast, "_FLOAT32", QUICK)
