"""The page of the yardstick from stored results: what is not run is said, and the picture is drawn."""

import pytest

from benchmarks.yardstick.__main__ import main
from benchmarks.yardstick.page import page
from benchmarks.yardstick.picture import picture
from benchmarks.yardstick.plan import Plan

PLAN = Plan(methods=("grpo", "region", "sensitivity", "oracle_plus"), seeds=(0, 1, 2), rates=(3e-4,), steps=30)
GAINS = {"grpo": 0.0, "region": 0.05, "oracle_plus": 0.2}


@pytest.fixture
def runs():
    made = []
    for method, more in GAINS.items():
        for seed in (*PLAN.seeds, PLAN.tuning_seed):
            curve = [
                {"step": 10 * n, "acc": 0.2 + n * (0.05 + more) / 2 + 0.01 * seed % 0.03, "look": 0.7, "text": 0.9}
                for n in range(4)
            ]
            start = 0 if seed == PLAN.tuning_seed else seed
            made.append(
                {
                    "start": f"half_ignorant-{start}-abc",
                    "method": method,
                    "rate": 3e-4,
                    "seed": seed,
                    "curve": curve,
                    "greedy": {"acc": 0.5},
                    "new_pairs": {"acc": 0.1},
                    "seconds": 2.0 if method == "oracle_plus" else 1.0,
                }
            )
    return made


@pytest.fixture
def scored():
    def at(value):
        return [value, None, None]

    methods = {
        method: {
            "separation": at(value),
            "precision": at(value),
            "control": at(0.01),
            "blame": at(value),
            "afterwards": at(0),
        }
        for method, value in (("grpo", 0.0), ("region", 0.1), ("sensitivity", 0.7), ("oracle_plus", 1.0))
    }
    methods["region"]["look"] = at(0.4)
    credit = {
        "grpo": [-0.5] * 6,
        "region": [-0.4] * 6,
        "sensitivity": [0, -0.5, 0, -0.5, 0, 0],
        "oracle_plus": [0, 0.5, 0, -0.5, 0, 0],
    }
    return [
        {
            "start": f"half_ignorant-{seed}-abc",
            "methods": methods,
            "statistics": {
                name: {"separation": at(0.3), "precision": at(0.2), "error": at(0.1)}
                for name in ("entropy", "image_mass, layer 0")
            },
            "looks": {"layer 0": {"share": at(0.5), "seeing": at(0.1), "late / early": at(0.9)}},
            "rates": {"reward": 0.2, "tokens with 90 % of the dependence": 0.1},
            "example": {"marks": ".P.E.", "credit": credit},
        }
        for seed in PLAN.seeds
    ]


def test_the_page_shows_scores_learning_and_what_was_not_run(runs, scored):
    lines = page(runs, scored, PLAN)
    text = "\n".join(lines)
    assert "| VPPO | +0.70 [no interval] |" in text
    grpo = next(line for line in lines if line.startswith("| GRPO | 0.0003 |"))
    assert "+0.000" in grpo
    plus = next(line for line in lines if line.startswith("| oracle_plus") and "0.0003" in line)
    assert "| 1.00 [" in plus
    assert plus.endswith("| 2.00 |")
    assert "| GRPO | +0.50 [no interval] | +0.10 [no interval] |" in text
    assert "| Training without the anchors hurts" in text
    assert "| VPPO | not run |" in text
    assert text[text.index("### From knowing starts") :].split("\n")[2] == "Not run."


def test_agreement_with_verl_is_shown_with_the_reason_of_a_difference(runs, scored):
    first = {"advantages": 3.4e-5, "log_probs": 4e-6, "from_grpo": 1.8, "reward": 0.2}
    found = {"method": "region", "verdict": "agrees up to rounding: it rounds", "loop": {}}
    short = {**found, "steps_of_verl": [first, {**first, "log_probs": 2e-5}]}
    rewards = [0.1] * 5 + [0.3] * 5
    long = {**found, "method": "grpo", "verdict": "agrees", "loop": {"rewards": rewards[::-1]}}
    long["steps_of_verl"] = [{**first, "reward": reward} for reward in rewards]
    text = "\n".join(page(runs, scored, PLAN, agreed=[short, long]))
    region = "| SAYO | 2 | 3.4e-05 | 4.0e-06 | 2.0e-05 | 1.8e+00 | agrees up to rounding | not run | not run |"
    assert region in text
    assert "| agrees | 0.100, 0.300 | 0.300, 0.100 |" in text
    assert "Agrees up to rounding: it rounds." in text
    assert "Agreement" not in "\n".join(page(runs, scored, PLAN))


def test_a_score_that_does_not_apply_is_a_dash(runs, scored):
    lines = page(runs, scored, PLAN)
    names = [name.strip() for name in next(line for line in lines if line.startswith("| method | sep")).split("|")]
    table = [line.split("|") for line in lines if line.count("|") == len(names) - 1]
    cells = {row: next(each for each in table if each[1].strip() == row) for row in ("SAYO", "VPPO")}
    assert cells["SAYO"][names.index("look")].strip() == "+0.40 [no interval]"
    assert cells["VPPO"][names.index("look")].strip() == "-"


def test_the_picture_is_drawn(runs, scored, tmp_path):
    picture(runs, scored, PLAN, tmp_path / "yardstick.png")
    assert (tmp_path / "yardstick.png").stat().st_size > 5000


def test_a_page_without_results_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["page", "--results", str(tmp_path), "--docs", str(tmp_path)])
    assert f"{tmp_path} holds no runs and scores" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
