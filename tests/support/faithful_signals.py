"""Signals for tests of ``attn_faithful``, our reading of Faithful-MR1.

Shape suffixes: B rows, T response tokens.
"""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from sayo_verl.errors import SayoError
from sayo_verl.methods import Signals
from sayo_verl.methods.faithful import FaithfulMethod
from sayo_verl.probe.statistics import Statistic
from sayo_verl.vision.intervention import Intervention

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
NAN = float("nan")
IMAGE_MASS = Statistic("image_mass", query_row="predicting")
REGION_MASS = Statistic("region_mass", query_row="predicting")
BY_REGION = {"causal_unit": "region", "counterfactual": Intervention(kind="region")}


def refusal(code: str, says: str = ""):
    return pytest.raises(SayoError, match=rf"^SAYO-{code}: .*{says}.* \| at .+ \| (.* \| )?fix: .+\Z")


def signals_of(log_probs, changed, mass, correct, *, mask=None, **settings) -> Signals:
    """Rows of one group that all carry the term, unless settings say otherwise."""
    log_probs, changed, mass = (torch.as_tensor(x, dtype=torch.float32) for x in (log_probs, changed, mass))
    B = len(log_probs)
    return Signals(
        **{
            "response_mask": torch.ones_like(log_probs, dtype=torch.int64) if mask is None else torch.as_tensor(mask),
            "entropy": torch.zeros_like(log_probs),
            "log_probs": log_probs,
            "statistics": {IMAGE_MASS: mass, REGION_MASS: mass / 2},
            "image_tokens": torch.full((B,), 10),
            "region_tokens": torch.full((B,), 2),
            "is_padding": torch.zeros(B, dtype=torch.bool),
            "uid": ("a",) * B,
            "counterfactuals": dict.fromkeys((Intervention(), Intervention("region")), changed),
            "correct": torch.as_tensor(correct, dtype=torch.float32),
            **settings,
        }
    )


def value_of(method: FaithfulMethod, signals: Signals) -> torch.Tensor:
    (term,) = method.credit(signals).terms
    return term.value


def one_row(log_probs, changed, mass, **settings) -> float:
    return value_of(FaithfulMethod(**settings), signals_of([log_probs], [changed], [mass], [1.0])).item()


log_prob = st.one_of(
    st.floats(-12.0, 0.0, width=32), st.floats(-(2.0**99), 0.0, width=32), st.sampled_from([0.0, -1e30, -88.0, -1e-7])
)
share = st.floats(0.0, 1.0, width=32)


@st.composite
def rows(draw: st.DrawFn, min_rows: int = 1, log_prob=log_prob):
    """(log-probs, changed, mass, mask, correct) of B rows with a token each; outside the mask NaN."""
    B, T = draw(st.integers(min_rows, 5)), draw(st.integers(1, 7))

    def table(element) -> torch.Tensor:
        row = st.lists(element, min_size=T, max_size=T)
        return torch.tensor(draw(st.lists(row, min_size=B, max_size=B)), dtype=torch.float32)

    log_probs, changed, mass, mask = table(log_prob), table(log_prob), table(share), table(st.booleans()).bool()
    mask[:, 0] |= ~mask.any(1)
    correct = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=B, max_size=B)))
    return *(x.masked_fill(~mask, NAN) for x in (log_probs, changed, mass)), mask, correct
