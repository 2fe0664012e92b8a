"""The comparison of the probe's paths before a run, with the fast path replaced by ones that are right or wrong."""

from types import SimpleNamespace

import pytest
import torch

from sayo_verl.doctor import packages as doctor
from sayo_verl.errors import SayoError
from sayo_verl.probe import reference, selfcheck
from sayo_verl.probe.taps import FLASH, FLASH_OF_ONE

SHAPE = {"heads": 6, "key_heads": 2, "head_dim": 32, "device": torch.device("cpu")}


def fast(monkeypatch, **changed):
    functions = {"attention_masses": reference.attention_masses, "attention_profile": reference.attention_profile}
    module = SimpleNamespace(__name__="sayo_verl.probe.fast", **{**functions, **changed})
    monkeypatch.setattr(selfcheck, "kernels", lambda path, device: module)


def test_the_reference_needs_no_comparison():
    assert selfcheck.check_path("auto", **SHAPE) == ("reference", 0.0)


def test_a_path_that_agrees_passes(monkeypatch):
    fast(monkeypatch)
    name, difference = selfcheck.check_path("fast", **SHAPE)
    assert name == "fast"
    assert difference < 2e-6  # of masses with the log-sum-exp given from those without

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


def flash_attention(wrong=lambda lse: lse):
    """A function as flash-attn's for packed rows, which returns its log-sum-exp [H, tokens]."""

    def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, causal, softmax_scale, return_attn_probs):
        assert causal
        assert return_attn_probs
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * softmax_scale
        of = torch.bucketize(torch.arange(len(q)), starts_q[1:], right=True)
        at = torch.arange(len(q))
        seen = (of[:, None] == of) & (at <= at[:, None])
        return q, wrong(logits.masked_fill(~seen, float("-inf")).logsumexp(-1)), None

    return lambda targets=FLASH: [(selfcheck, "varlen", varlen)] if targets is FLASH else []


def test_the_log_sum_exp_of_flash_attention_is_compared_before_it_is_used(monkeypatch):
    fast(monkeypatch)
    monkeypatch.setattr(selfcheck, "flash_functions", flash_attention())
    assert selfcheck.check_path("fast_lse", **SHAPE)[1] < 1e-5
    for wrong in (lambda lse: lse * 1.4427, lambda lse: lse.T, lambda lse: lse[:, None], lambda lse: lse.roll(1, 1)):
        monkeypatch.setattr(selfcheck, "flash_functions", flash_attention(wrong))
        assert selfcheck.check_path("fast", **SHAPE)[1] < 1e-5  # which has no use for it
        with pytest.raises(SayoError, match="SAYO-P24"):
            selfcheck.check_path("fast_lse", **SHAPE)


def test_the_log_sum_exp_of_a_row_by_itself_is_compared_too(monkeypatch):
    """A micro-batch of one row calls flash-attn's function for sequences of one length."""
    fast(monkeypatch)
    ((_, _, varlen),) = flash_attention()()

    def of_one(wrong):
        def dense(q, k, v, **settings):
            ends = torch.tensor([0, q.shape[1]], dtype=torch.int32)
            _, lse, _ = varlen(q[0], k[0], v[0], ends, ends, q.shape[1], q.shape[1], **settings)
            return q, wrong(lse[None]), None

        both = {FLASH: varlen, FLASH_OF_ONE: dense}
        monkeypatch.setattr(selfcheck, "flash_functions", lambda targets=FLASH: [(selfcheck, "", both[targets])])

    of_one(lambda lse: lse)
    assert selfcheck.check_path("fast_lse", **SHAPE)[1] < 1e-5
    for wrong in (lambda lse: lse * 1.4427, lambda lse: lse.transpose(1, 2), lambda lse: lse[0]):
        of_one(wrong)
        with pytest.raises(SayoError, match="SAYO-P24"):
            selfcheck.check_path("fast_lse", **SHAPE)


def test_no_flash_attention_to_take_a_log_sum_exp_from_is_refused(monkeypatch):
    fast(monkeypatch)
    monkeypatch.setattr(selfcheck, "flash_functions", lambda targets=FLASH: [])
    with pytest.raises(SayoError, match=r"SAYO-P31: there is no FlashAttention .*probe_path=fast"):
        selfcheck.check_path("fast_lse", **SHAPE)


def test_masses_that_are_wrong_only_with_a_log_sum_exp_given_stop_the_run(monkeypatch):
    def wrong(*args, lse=None, **kwargs):
        mass, found = reference.attention_masses(*args, lse=lse, **kwargs)
        return reference.Masses(mass if lse is None else mass * 0.99, found)

    fast(monkeypatch, attention_masses=wrong)
    with pytest.raises(SayoError, match="SAYO-P24"):
        selfcheck.check_path("fast", **SHAPE)
