"""The region reward: recorded numbers, hand-computed cases, identities, token selection, neutral rows.

Shape suffixes: B rows, T response tokens, H heads, S keys, V visual tokens.
"""

import itertools
import json
import math
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sayo_verl.errors import SayoError
from sayo_verl.methods import RegionMethod, Signals, group_advantage
from sayo_verl.methods.region import EPS, POOLINGS, region_reward, select_tokens, target_attention
from sayo_verl.probe.statistics import Statistic

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
CASES = json.loads((Path(__file__).parent / "golden" / "sayo_released.json").read_text())["cases"]
NAN = float("nan")


def refusal(code: str, says: str = ""):
    return pytest.raises(SayoError, match=rf"^SAYO-{code}: .*{says}.* \| at .+ \| (.* \| )?fix: .+\Z")


# ----------------------------------------------------------------------------------------------------- recorded numbers


def means_of_recorded(case: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a(t), v(t) [B, T] and the selected tokens of a recorded case, from its attention rows."""
    first, n_image = case["first_image"], case["grid"][0] * case["grid"][1]
    B, T = len(case["attention"]), len(case["attention"][0])
    target, image = torch.zeros(B, T, dtype=dtype), torch.zeros(B, T, dtype=dtype)
    selected = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        in_region = sorted({i for low, high in case["focus_token_ranges"][b] for i in range(low, high + 1)})
        assert 0 <= in_region[0] <= in_region[-1] < n_image
        selected[b, case["selected"][b]] = True
        for t in range(T):
            attention_HS = torch.tensor(case["attention"][b][t], dtype=dtype)
            # one key more at every step: the row in which token t is the input sees the prompt and tokens 0..t
            assert attention_HS.shape == (case["heads"], case["prompt_len"] + t + 1)
            visual_V = attention_HS.mean(0)[first : first + n_image]
            assert visual_V.numel() == n_image
            target[b, t], image[b, t] = visual_V[in_region].mean(), visual_V.mean()
    return target, image, selected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"seed{c['seed']}")
def test_agrees_with_the_released_reward(case, dtype):
    ours = region_reward(*means_of_recorded(case, dtype))
    error = (ours.double() - torch.tensor(case["reward"], dtype=torch.float64)).abs().max().item()
    print(f"largest difference from the released reward, {dtype}: {error:.1e}")
    assert error < 1e-5


def test_recorded_cases_cover_both_signs_and_the_whole_image():
    rewards = [r for case in CASES for r in case["reward"]]
    assert min(rewards) < -0.5
    assert max(rewards) > 0.1
    assert 0.0 in rewards


# ----------------------------------------------------------------------------------------------- formula and identities


@pytest.mark.parametrize(
    ("target", "image", "expected"),
    [
        ([0.2], [0.1], 0.6),  # x = 2: (4 - 1) / (4 + 1)
        ([0.1], [0.2], -0.6),
        ([0.3], [0.1], 0.8),  # x = 3: (9 - 1) / (9 + 1)
        ([0.25], [0.25], 0.0),
        ([0.0], [0.0], 0.0),  # no attention on the image at all: eps over eps
        ([0.0], [0.5], -1.0),
        ([0.1, 0.3], [0.1, 0.1], 0.6),  # means before the ratio: 0.2 / 0.1, not the mean of 0 and 0.8
        ([0.02, 0.04], [0.05, 0.01], 0.0),
    ],
)
def test_hand_computed_rewards(target, image, expected):
    a, v = torch.tensor([target]), torch.tensor([image])
    everything = torch.ones_like(a, dtype=torch.bool)
    assert region_reward(a, v, everything).item() == pytest.approx(expected, abs=1e-6)
    assert target_attention(a, v, everything).item() == pytest.approx((1 + expected) / 2, abs=1e-6)


def test_only_selected_tokens_count_and_nan_elsewhere_is_not_read():
    a = torch.tensor([[0.2, NAN, 0.9], [NAN, 0.3, float("inf")]])
    v = torch.tensor([[0.1, NAN, 0.1], [NAN, 0.1, NAN]])
    selected = torch.tensor([[True, False, False], [False, True, False]])
    assert region_reward(a, v, selected).tolist() == pytest.approx([0.6, 0.8], abs=1e-6)


def test_a_row_with_nothing_selected_has_reward_zero():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert region_reward(torch.full((2, 3), NAN), torch.full((2, 3), NAN), nothing).tolist() == [0.0, 0.0]


shares = st.floats(min_value=1e-6, max_value=1.0)


@PROPERTY
@given(a=shares, v=shares)
def test_identities(a, v):
    one = torch.ones(1, 1, dtype=torch.bool)
    a_11, v_11 = torch.tensor([[a]], dtype=torch.float64), torch.tensor([[v]], dtype=torch.float64)
    r = region_reward(a_11, v_11, one).item()
    x = (a + EPS) / (v + EPS)
    assert r == pytest.approx((x * x - 1) / (x * x + 1), abs=1e-12)
    assert -1 <= r <= 1
    assert region_reward(v_11, a_11, one).item() == pytest.approx(-r, abs=1e-12)
    R_a = target_attention(a_11, v_11, one).item()
    assert R_a == pytest.approx((1 + r) / 2, abs=1e-12)
    assert R_a == pytest.approx(x * x / (x * x + 1), abs=1e-12)


def test_looking_more_at_the_whole_image_is_not_rewarded_but_looking_at_the_target_is():
    one = torch.ones(1, 1, dtype=torch.bool)
    little = region_reward(torch.tensor([[0.02]]), torch.tensor([[0.01]]), one)
    much = region_reward(torch.tensor([[0.08]]), torch.tensor([[0.04]]), one)
    assert torch.allclose(little, much, atol=1e-5)
    aimed = region_reward(torch.tensor([[0.09]]), torch.tensor([[0.04]]), one)
    assert aimed > much


def test_float32_against_float64():
    generator = torch.Generator().manual_seed(0)
    shape = (512, 40)
    image = torch.rand(shape, generator=generator).pow(4) * 0.1 + 1e-7
    target = image * torch.exp(3 * torch.randn(shape, generator=generator)).clamp(1e-3, 1e3)
    selected = torch.rand(shape, generator=generator) < 0.3
    error = (
        (region_reward(target, image, selected) - region_reward(target.double(), image.double(), selected)).abs().max()
    )
    print(f"largest difference of float32 from float64: {error.item():.1e}")
    assert error < 1e-6


# ------------------------------------------------------------------------------------------------------------- tokens Q


@pytest.mark.parametrize("fraction", ["0.3", "0.1", "0.2", "0.5", "0.7", "0.9", "1", "0.05", "0.6", "0.01", "0.58"])
def test_number_of_selected_tokens(fraction):
    n_max = 50
    mask = torch.tril(torch.ones(n_max, n_max))  # row n - 1 has n valid tokens
    entropy = torch.rand(n_max, n_max, generator=torch.Generator().manual_seed(0))
    counts = select_tokens(entropy, mask, float(fraction)).sum(-1).tolist()
    # decimal arithmetic: floor(0.58 * 50) is 29, though in binary the product is 28.999999999999996
    assert counts == [max(1, int(Decimal(fraction) * n)) for n in range(1, n_max + 1)]


def test_the_paper_fraction_by_hand():
    mask = torch.tril(torch.ones(50, 50))
    counts = select_tokens(torch.rand(50, 50), mask, 0.3).sum(-1).tolist()
    assert [counts[n - 1] for n in (1, 3, 4, 6, 7, 9, 10, 11, 13, 14, 20, 30, 40, 50)] == [
        1,
        1,
        1,
        1,
        2,
        2,
        3,
        3,
        3,
        4,
        6,
        9,
        12,
        15,
    ]


def test_of_equal_entropies_the_earlier_token_is_taken():
    entropy = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 3.0, 1.0, 3.0]])
    picked = select_tokens(entropy, torch.ones(3, 5), 0.4)
    assert picked.int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 1]]


@pytest.mark.parametrize("junk", [NAN, float("inf"), float("-inf"), 1e30])
def test_values_outside_the_mask_never_matter(junk):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    entropy = torch.tensor([[0.1, 0.4, 0.3, 0.2, 0.0, 0.0], [0.0, 0.5, 0.0, 0.6, 0.7, 0.0], [0.0] * 6])
    clean = select_tokens(entropy, mask, 0.5)
    assert clean.int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
    assert torch.equal(select_tokens(entropy.masked_fill(mask == 0, junk), mask, 0.5), clean)


def test_selection_leaves_its_inputs_alone():
    entropy, mask = torch.tensor([[0.3, NAN, 0.1]]), torch.tensor([[1, 0, 1]])
    kept = entropy.clone(), mask.clone()
    select_tokens(entropy, mask, 0.3)
    assert torch.equal(entropy.nan_to_num(-1), kept[0].nan_to_num(-1))
    assert torch.equal(mask, kept[1])


@PROPERTY
@given(
    rows=st.integers(1, 12).flatmap(
        lambda T: st.lists(
            st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), st.booleans()), min_size=T, max_size=T),
            min_size=1,
            max_size=4,
        )
    ),
    percent=st.integers(1, 100),
)
def test_selection_against_sorting_by_hand(rows, percent):
    entropy = torch.tensor([[e for e, _ in row] for row in rows])
    mask = torch.tensor([[m for _, m in row] for row in rows])
    expected = []
    for row in rows:
        valid = [t for t, (_, m) in enumerate(row) if m]
        k = max(1, percent * len(valid) // 100) if valid else 0
        chosen = set(sorted(valid, key=lambda t: (-row[t][0], t))[:k])
        expected.append([t in chosen for t in range(len(row))])
    assert select_tokens(entropy, mask, percent / 100).tolist() == expected


# ------------------------------------------------------------------------------------------------- how many are pooled


def heavy_tailed_responses(B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention per visual token as models have it: a few tokens look hard at the target, most hardly at the image."""
    draw = torch.Generator().manual_seed(0)
    target = torch.exp(1.5 * torch.randn(B, T, generator=draw, dtype=torch.float64) - 5.0)
    image = torch.exp(0.5 * torch.randn(B, T, generator=draw, dtype=torch.float64) - 4.5)
    return target, image


def mean_reward_of_random_tokens(k: int, pooling: str) -> tuple[float, float]:
    """Mean of r_v over responses when Q is k random tokens of each, and its standard error."""
    target, image = heavy_tailed_responses(4000, 24)
    order = torch.rand(target.shape, generator=torch.Generator().manual_seed(k)).argsort(-1).argsort(-1)
    r_v = region_reward(target, image, order < k, pooling)
    return float(r_v.mean()), float(r_v.std() / len(r_v) ** 0.5)


def test_pooling_attention_grows_with_the_number_of_tokens_although_they_are_random():
    means = [mean_reward_of_random_tokens(k, "attention")[0] for k in (1, 3, 8, 24)]
    assert means == sorted(means)
    assert means[2] - means[0] > 0.25
    print(f"pooling=attention, k = 1, 3, 8, 24: {[round(m, 3) for m in means]}")


@pytest.mark.parametrize("k", [1, 3, 8])
def test_pooling_ratios_does_not_depend_on_the_number_of_tokens(k):
    mean, error = mean_reward_of_random_tokens(k, "ratio")
    whole, _ = mean_reward_of_random_tokens(24, "ratio")  # of the same responses: all tokens, no chance in it
    print(f"pooling=ratio, k = {k}: {mean:.3f} against {whole:.3f} over all tokens, standard error {error:.3f}")
    assert mean == pytest.approx(whole, abs=4 * error)


@given(k=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_over_all_choices_of_k_tokens_the_mean_of_ratios_is_exactly_that_of_the_response(k, seed):
    draw = torch.Generator().manual_seed(seed)
    target, image = (torch.rand(1, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    chosen = torch.tensor([[t in choice for t in range(6)] for choice in itertools.combinations(range(6), k)])
    over_choices = region_reward(target.expand(len(chosen), 6), image.expand(len(chosen), 6), chosen, "ratio")
    whole = region_reward(target, image, torch.ones(1, 6, dtype=torch.bool), "ratio")
    assert float(over_choices.mean()) == pytest.approx(float(whole), abs=1e-12)


def test_one_token_has_one_reward_whichever_way_it_is_pooled():
    target, image = heavy_tailed_responses(50, 4)
    first = torch.tensor([[True, False, False, False]]).expand(50, 4)
    assert torch.allclose(region_reward(target, image, first), region_reward(target, image, first, "ratio"))


def test_the_setting_reaches_the_term():
    signals = replace(batch(), entropy=torch.zeros(6, 4))
    terms = {p: RegionMethod(pooling=p, entropy_fraction=1.0).credit(signals).terms[0].value for p in POOLINGS}
    # row 0: x of its tokens is 1, 2 and 0.83
    assert float(terms["ratio"][0]) == pytest.approx((0 + 0.6 + ((25 / 36) - 1) / ((25 / 36) + 1)) / 3, abs=1e-6)
    assert float(terms["attention"][0]) != pytest.approx(float(terms["ratio"][0]), abs=1e-3)


# ----------------------------------------------------------------------------------------------------------- the method


IMAGE_MASS, REGION_MASS = Statistic("image_mass"), Statistic("region_mass")


def values(signals: Signals, name: str) -> torch.Tensor:
    return getattr(signals, name) if name in ("entropy", "log_probs") else signals[Statistic(name)]


def batch() -> Signals:
    """Six rows: 0 and 5 carry the term; 1 has no box, 2 no image, 3 is masked, 4 is a padding row with boxes."""
    return Signals(
        response_mask=torch.tensor(
            [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
        ),
        entropy=torch.tensor(
            [[0.1, 2.0, 0.5, NAN], [1.0, 0.5, NAN, NAN], [0.7, NAN, NAN, NAN], [NAN] * 4, [NAN] * 4, [3, 1, 2, 0]]
        ),
        log_probs=torch.full((6, 4), -0.5),
        statistics={
            IMAGE_MASS: torch.tensor(
                [[0.5, 0.4, 0.3, NAN], [0.2, 0.2, NAN, NAN], [NAN] * 4, [NAN] * 4, [NAN] * 4, [0.2, 0.8, 0.8, 0.8]]
            ),
            REGION_MASS: torch.tensor(
                [[0.1, 0.16, 0.05, NAN], [0.0, 0.0, NAN, NAN], [NAN] * 4, [NAN] * 4, [NAN] * 4, [0.05, 0.2, 0.2, 0.2]]
            ),
        },
        image_tokens=torch.tensor([10, 10, 0, 4, 0, 4]),
        region_tokens=torch.tensor([2, 0, 0, 1, 3, 1]),
        is_padding=torch.tensor([False, False, False, False, True, False]),
        uid=("a", "b", "c", "d", "e", "a"),
    )


def test_neutral_rows_have_one_reason_each():
    reasons = {name: hit.nonzero().flatten().tolist() for name, hit in batch().neutral_reasons().items()}
    assert reasons == {"padding": [4], "masked": [3], "no_image": [2], "no_box": [1]}


def test_the_term_is_carried_by_rows_with_a_region_only():
    signals = batch()
    signals.check()
    (term,) = RegionMethod(weight=0.5).credit(signals).terms
    assert (term.name, term.weight) == ("region_reward", 0.5)
    assert term.valid.tolist() == [True, False, False, False, False, True]
    # row 0: token 1 alone, a = 0.16 / 2, v = 0.4 / 10, x = 2; row 5: token 0 alone, a = 0.05 / 1, v = 0.2 / 4, x = 1
    assert term.value[term.valid].tolist() == pytest.approx([0.6, 0.0], abs=1e-6)


def test_neutral_rows_keep_their_task_reward():
    task = torch.tensor([1.0, 0.25, 0.5, 0.75, 0.125, 2.0])
    terms = RegionMethod(weight=0.5).credit(batch()).terms
    _, reward = group_advantage(task, batch().response_mask, ["a", "b", "c", "d", "e", "a"], terms)
    assert reward[1:5].tolist() == task[1:5].tolist()
    assert reward[[0, 5]].tolist() == pytest.approx([1.3, 2.0], abs=1e-6)


def test_metrics_by_hand():
    metrics = RegionMethod().credit(batch()).metrics

    def r(x: float) -> float:
        return (x * x - 1) / (x * x + 1)

    of_row_0 = (0.5 + 0.8 + (1 + r(0.025 / 0.03)) / 2) / 3  # R_a of its tokens one by one
    assert metrics == pytest.approx(
        {
            "rows_with_region_share": 2 / 5,  # of the five rows that are not padding
            "selected_token_share": (1 + 1 + 1 + 1) / (3 + 2 + 1 + 0 + 4),
            "region_reward/mean": 0.3,
            "region_reward/std": 0.3,
            "target_attention/mean": (0.8 + 0.5) / 2,
            "token_target_attention/mean": (0.8 + 0.5) / 2,
            "token_target_attention_all/mean": (of_row_0 + 0.5) / 2,
            "selected_tokens/mean": 1.0,
            "image_mass/mean": (0.4 + 0.65) / 2,
            "region_mass/mean": (0.31 / 3 + 0.1625) / 2,
        },
        abs=1e-6,
    )


def test_metrics_of_a_batch_without_regions_say_so_and_are_finite():
    signals = replace(batch(), region_tokens=torch.zeros(6, dtype=torch.long))
    metrics = RegionMethod().credit(signals).metrics
    assert metrics["rows_with_region_share"] == 0
    assert signals.neutral_reasons()["no_box"].sum() == 3
    assert not any("mean" in name for name in metrics)
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_request_follows_the_settings():
    request = RegionMethod(layers=(-1, 3), coverage=0.25).needs().statistics
    assert request.statistics == (Statistic("image_mass", (-1, 3)), Statistic("region_mass", (-1, 3)))
    assert (request.layers, request.coverage) == ((-1, 3), 0.25)
    rows = {statistic.query_row for statistic in RegionMethod(query_row="predicting").needs().statistics.statistics}
    assert rows == {"predicting"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", -0.1),
        ("weight", NAN),
        ("weight", float("inf")),
        ("entropy_fraction", 0.0),
        ("entropy_fraction", 1.01),
        ("entropy_fraction", NAN),
        ("entropy_fraction", -1.0),
        ("layers", ()),
        ("layers", (3, 3)),
        ("coverage", 0.0),
        ("coverage", 1.5),
        ("coverage", NAN),
        ("pooling", "mean"),
        ("pooling", ""),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_key(key, value):
    wrong = "is not one of the choices" if isinstance(value, str) else "is out of range"
    with refusal("A05", f"{key} {wrong}") as caught:
        RegionMethod(**{key: value})
    assert caught.value.where == f"algorithm.attn.region.{key}"
    assert key in caught.value.fix


# ---------------------------------------------------------------------------------------------------- checks of signals


def test_values_that_nobody_reads_may_be_anything():
    batch().check()


@pytest.mark.parametrize("name", ["entropy", "log_probs", "image_mass", "region_mass"])
@pytest.mark.parametrize("value", [NAN, float("inf"), -0.5, 1.5])
def test_a_bad_value_on_a_response_token_is_refused(name, value):
    signals = batch()
    values(signals, name)[0, 1] = value
    if (name, value) in (("entropy", 1.5), ("log_probs", -0.5)):
        signals.check()  # nats have no upper bound, log-probs no lower one
        return
    with refusal("A03", name):
        signals.check()


def test_a_row_without_image_needs_entropy_only():
    signals = batch()
    signals[IMAGE_MASS][2] = 7.0
    signals.check()
    signals.entropy[2, 0] = NAN
    with refusal("A03", "entropy"):
        signals.check()


@pytest.mark.parametrize(
    "name", ["entropy", "log_probs", "image_mass", "region_mass", "image_tokens", "region_tokens", "is_padding"]
)
def test_a_statistic_of_the_wrong_shape_is_refused(name):
    signals = batch()
    if name in ("image_mass", "region_mass"):
        short = {"statistics": {**signals.statistics, Statistic(name): signals[Statistic(name)][:-1]}}
    else:
        short = {name: getattr(signals, name)[:-1]}
    with refusal("A02", name):
        replace(signals, **short).check()


def test_a_statistic_that_was_not_measured_is_refused():
    with refusal("A10", "was not measured"):
        RegionMethod(layers=(-2,)).credit(batch())


# -------------------------------------------------------------------------------------------- the per-token extension


def test_the_extension_weights_the_selected_tokens_and_gives_no_reward():
    method = RegionMethod(weight=0.5, per_token=True)
    assert method.gives == {"token"}
    credit = method.credit(batch())
    assert credit.terms == ()
    expected = torch.ones(6, 4)
    expected[0, 1] = 1 + 0.5 * 0.6  # a = 0.16 / 2, v = 0.4 / 10: x = 2
    assert credit.token_weight is not None
    assert torch.allclose(credit.token_weight, expected, atol=1e-6)  # row 5: x = 1, factor 1
    assert RegionMethod(weight=0.0, per_token=True).credit(batch()).token_weight is None


def test_the_extension_cannot_turn_a_sign():
    with refusal("A05", "weight"):
        RegionMethod(weight=1.5, per_token=True)
    signals = batch()
    signals[REGION_MASS][:] = 0.0
    credit = RegionMethod(weight=1.0, per_token=True, entropy_fraction=1.0).credit(signals)
    assert credit.token_weight is not None
    assert (credit.token_weight >= 0).all()


def test_what_a_setting_gives():
    assert RegionMethod().gives == {"reward"}
    assert RegionMethod(weight=0.0).gives == frozenset()
