"""The page of the yardstick from stored results: what is not run is said, and the picture is drawn."""

import json

import pytest

import sayo_verl.methods
from benchmarks.yardstick.__main__ import main
from benchmarks.yardstick.loop import ROOT
from benchmarks.yardstick.page import page
from benchmarks.yardstick.picture import picture
from benchmarks.yardstick.plan import Plan
from benchmarks.yardstick.store import content_hash

METHODS = ("grpo", "region", "sensitivity", "oracle_plus")
PLAN = Plan(methods=METHODS, seeds=(0, 1, 2), rates=(3e-4,), common_rate=3e-4, steps=30)
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
    grpo = next(line for line in lines if line.startswith("| GRPO | 3 |"))
    assert "+0.000" in grpo
    plus = next(line for line in lines if line.startswith("| oracle_plus") and "blame and praise | 3 |" in line)
    assert "| 1.00 [" in plus
    assert plus.endswith("| 2.00 |")
    assert "| GRPO | +0.500 [no interval] | - | +0.100 [no interval] |" in text
    assert "| Training without the anchors hurts" in text
    assert "| VPPO | not run |" in text
    assert text[text.index("### From knowing starts") :].split("\n")[2].startswith("Not run")


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


def test_the_picture_is_drawn_without_an_example_and_without_a_span(runs, scored, tmp_path):
    equal = [run | {"curve": runs[0]["curve"]} for run in runs]
    picture(equal, [each | {"example": None} for each in scored], PLAN, tmp_path / "yardstick.png")
    assert (tmp_path / "yardstick.png").stat().st_size > 5000
    row = next(line for line in page(equal, scored, PLAN) if line.startswith("| SAYO | 3 |"))
    assert "| no span |" in row


def test_all_columns_of_a_method_are_of_the_seeds_that_can_be_compared(runs, scored):
    fewer = [run for run in runs if (run["method"], run["seed"]) not in {("region", 0), ("oracle_plus", 1)}]
    lines = page(fewer, scored, PLAN)
    learned = lines[lines.index("### From half-ignorant starts", lines.index("## Learning")) :]
    seeds = [line.split(" | ")[1].split(":")[0] for line in learned[6:10]]
    assert seeds == ["2", "1", "not run", "2"]


def test_greedy_accuracy_before_training_stands_beside_that_after_it(runs, scored):
    begun = {f"half_ignorant-{seed}-abc": {"acc": 0.25} for seed in PLAN.seeds} | {"knowing-0-abc": {"acc": 0.9}}
    lines = page(runs, scored, PLAN, begun=begun)
    assert "| before training | +0.250 [no interval] | - | - |" in lines
    assert "| GRPO | +0.500 [no interval] | +0.250 [no interval] | +0.100 [no interval] |" in lines


def test_a_reader_sees_the_runs_that_chose_the_rates(runs, scored):
    lines = page(runs, scored, PLAN)
    table = lines[lines.index("### Each method at a rate of its own") :]
    assert table[4] == "| method | final at 0.0003 | rate | gain over GRPO | share |"
    assert table[6].startswith("| GRPO | 0.")
    assert table[8] == "| VPPO | not run | - | not run | not run |"
    without = page([run for run in runs if run["seed"] != PLAN.tuning_seed], scored, PLAN)
    assert without[without.index(table[0]) + 2] == "Not run."


def stored(folder, runs, scored):
    for part, found in (("runs", runs), ("scores", scored)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for each in found:
            (folder / part / f"{content_hash(each)}.json").write_text(json.dumps(each))


SIZES = {"steps": 30, "prompts": 16, "responses": 8, "clip": 1.0, "eval_every": 10, "eval_scenes": 512, "used": {}}


def test_the_page_says_how_many_steps_and_rates_there_were(runs, scored, tmp_path):
    stored(tmp_path, [run | SIZES for run in runs], [each | SIZES | {"seed": 0} for each in scored])
    main(["page", "--results", str(tmp_path), "--docs", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "yardstick.md").read_text()
    assert "30 steps of 16 prompts x 8 rollouts" in text
    assert "final at 0.0003" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 60}, "mixes results of different settings: steps"),
        ({"used": {"region": {"weight": 2.0}}}, "two results of region at 0.0003 from half_ignorant-0-abc"),
        (
            {"start": "half_ignorant-0-new", "seed": 7},
            "one kind and seed: half_ignorant-0-abc and half_ignorant-0-new",
        ),
    ],
)
def test_a_page_of_results_that_do_not_belong_together_is_refused(change, said, runs, scored, tmp_path, capsys):
    region = next(run for run in runs if (run["method"], run["seed"]) == ("region", 0))
    stored(tmp_path, [run | SIZES for run in runs], [each | SIZES | {"seed": 0} for each in scored])
    stored(tmp_path, [region | SIZES | change], [])
    with pytest.raises(SystemExit):
        main(["page", "--results", str(tmp_path), "--docs", str(tmp_path / "docs")])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_scores_and_runs_of_different_starts_are_refused(runs, scored, tmp_path, capsys):
    other = [each | SIZES | {"seed": 0, "start": each["start"].replace("-0-abc", "-0-new")} for each in scored]
    stored(tmp_path, [run | SIZES for run in runs], other)
    with pytest.raises(SystemExit):
        main(["page", "--results", str(tmp_path), "--docs", str(tmp_path / "docs")])
    assert "two starts of one kind and seed" in capsys.readouterr().err


def test_the_stored_results_have_their_remarks_however_they_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    main(["page", "--results", "benchmarks/results/yardstick", "--docs", str(tmp_path)])
    assert "## In short" in (tmp_path / "yardstick.md").read_text()


def test_a_page_without_results_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["page", "--results", str(tmp_path), "--docs", str(tmp_path)])
    assert f"{tmp_path} holds no runs and scores" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["all", "--kinds", "ignorant"], "no start ignorant; there are half_ignorant, knowing"),
        (["all", "--methods", "grpo,region"], "--methods lacks oracle_plus"),
        (["all", "--methods", "grpo,oracle_plus,region_all"], "so name region alone"),
        (["all", "--seeds", "99,100"], "--seeds has 100, which chooses the rates"),
        (["all", "--steps", "0"], "--steps is at least 1"),
        (["all", "--processes", "0"], "--processes is at least 1"),
        (["all", "--seeds", "0,"], "'0,' is no list of int"),
        (["score", "--start", "nowhere"], "nowhere is no start: make one with `start`"),
        (["train", "--methods", "grpo,gpro", "--start", "nowhere"], "no method gpro"),
    ],
)
def test_a_command_that_cannot_work_is_refused_at_once(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_own_method_that_fails_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    known = sayo_verl.methods.METHODS.copy()
    for room in ("sayo_verl.methods", "benchmarks.yardstick.loop"):
        monkeypatch.setattr(f"{room}.METHODS", known)
    own, example = tmp_path / "mistyped.py", (ROOT / "recipe/example/reliance.py").read_text()
    # a name of its own, because another test may have loaded the example
    own.write_text(example.replace("attn_reliance", "attn_mistyped").replace("signals.log_probs", "signals.log_prob"))
    with pytest.raises(SystemExit):
        main(["all", "--methods", "grpo,oracle_plus,mistyped", "--modules", str(own), "--out", str(tmp_path / "out")])
    assert "L72" in (said := capsys.readouterr().err)
    assert "log_prob" in said
    assert not (tmp_path / "out").exists()
