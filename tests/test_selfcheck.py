"""The comparison of the probe's paths before a run, with the fast path replaced by ones that are right or wrong."""

from types import SimpleNamespace

import pytest
import torch

from sayo_verl import doctor
from sayo_verl.errors import SayoError
from sayo_verl.probe import reference, selfcheck

SHAPE = {"heads": 6, "key_heads": 2, "head_dim": 32, "device": torch.device("cpu")}


def fast(monkeypatch, **changed):
    functions = {"attention_masses": reference.attention_masses, "attention_profile": reference.attention_profile}
    module = SimpleNamespace(__name__="sayo_verl.probe.fast", **{**functions, **changed})
    monkeypatch.setattr(selfcheck, "kernels", lambda path, device: module)


def test_the_reference_needs_no_comparison():
    assert selfcheck.check_path("auto", **SHAPE) == ("reference", 0.0)


def test_a_path_that_agrees_passes(monkeypatch):
    fast(monkeypatch)
    assert selfcheck.check_path("fast", **SHAPE) == ("fast", 0.0)

    def nearly(*args, **kwargs):
        mass, lse = reference.attention_masses(*args, **kwargs)
        return reference.Masses(mass + 1e-5, lse)

    fast(monkeypatch, attention_masses=nearly)
    name, difference = selfcheck.check_path("fast", **SHAPE)
    assert name == "fast"
    assert difference == pytest.approx(1e-5, rel=0.05)


def wrong_mass(*args, **kwargs):
    mass, lse = reference.attention_masses(*args, **kwargs)
    return reference.Masses(mass * 1.001, lse)


def one_nan(*args, **kwargs):
    mass, lse = reference.attention_masses(*args, **kwargs)
    lse[3, 1] = float("nan")
    return reference.Masses(mass, lse)


def other_group(query, key, *args, **kwargs):
    """Key heads in another order: what a kernel with a wrong grouping does."""
    return reference.attention_masses(query, key.flip(1), *args, **kwargs)


@pytest.mark.parametrize("broken", [wrong_mass, one_nan, other_group], ids=lambda f: f.__name__)
def test_a_path_that_differs_stops_the_run(monkeypatch, broken):
    fast(monkeypatch, attention_masses=broken)
    with pytest.raises(SayoError, match=r"SAYO-P24: the fast path .*6 heads, 2 key heads of 32.*probe_path=reference"):
        selfcheck.check_path("fast", **SHAPE)


def test_a_wrong_profile_stops_the_run(monkeypatch):
    fast(monkeypatch, attention_profile=lambda *args, **kwargs: reference.attention_profile(*args, **kwargs) * 0.99)
    with pytest.raises(SayoError, match="SAYO-P24"):
        selfcheck.check_path("fast", **SHAPE)


def test_the_fast_path_without_a_gpu_is_refused_before_the_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from sayo_verl.probe import kernels

    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(SayoError, match="SAYO-P16"):
        selfcheck.check_path("fast", **SHAPE)


def test_doctor_tells_the_path_and_what_is_wrong_with_it(monkeypatch):
    found = doctor.check_probe()
    assert found.right
    assert found.found == "reference path, on cpu"
    fast(monkeypatch, attention_masses=wrong_mass)
    found = doctor.check_probe()
    assert not found.right
    assert "SAYO-P24" in found.found
    assert "probe_path=reference" in found.fix
