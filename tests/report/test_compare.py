"""Comparison of runs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from support import report_runs
from support.report_runs import ATTENTION, GRPO, VALIDATION, cells, line, recorded, write_run

from sayo_verl.cli import main
from sayo_verl.errors import SayoError
from sayo_verl.report.compare import Comparison, compare
from sayo_verl.report.compare_page import comparison_page, intro, markdown, print_comparison, verdict

CONFIG = """
algorithm: {{adv_estimator: {estimator}, attn: {{region: {{weight: {weight}}}, dual: {{beta: {unused}}}}}}}
data: {{train_files: [{data}/train.parquet], val_files: [/d/val.parquet], seed: {seed}}}
actor_rollout_ref: {{model: {{path: {model}}}, actor: {{optim: {{lr: {lr}}}}}}}
reward: {{custom_reward_function: {{name: {reward}}}}}
trainer: {{default_local_dir: /o/{seed}, experiment_name: n{seed}}}
"""
DEFAULT = {"weight": 1.0, "unused": 0.3, "data": "/d", "model": "/m", "lr": 1e-6, "reward": "score"}


def made(folder: Path, estimator: str, seed: int, score: float, steps: int = 8, **given: object) -> Path:
    """A run whose task reward is ``score`` in every step, and whose last step took 2 seconds."""
    data = (ATTENTION if estimator.startswith("attn_") else GRPO) | {"critic/score/mean": score, "timing_s/step": 2.0}
    lines = [line(n, **data | {VALIDATION: score / 2}) for n in range(1, steps + 1)]
    version = given.pop("verl", "0.9.1")
    launch = {"run_id": folder.name, "estimator": estimator, "total_steps": steps, "versions": {"verl": version}}
    write_run(folder, *lines, launch=launch | {"data": given.pop("sizes", {})})
    (folder / "run.yaml").write_text(CONFIG.format(estimator=estimator, seed=seed, **DEFAULT | given))
    return folder


@pytest.fixture
def six(tmp_path) -> list[Path]:
    """Three seeds of GRPO and of region; region is better by 0.2 on every seed, which differ by more."""
    grpo = [made(tmp_path / f"g{seed}", "grpo", seed, 1.0 + seed) for seed in range(3)]
    return grpo + [made(tmp_path / f"r{s}", "attn_region", s, 1.2 + s + 0.01 * (s == 1)) for s in range(3)]


def table_of(shown: Comparison) -> dict[str, list[str]]:
    return cells(markdown(shown))


def test_runs_that_differ_only_in_the_seed_are_one_group_with_mean_and_interval(six):
    shown = compare(six)
    assert [(group.label, len(group.members)) for group in shown.groups] == [("grpo", 3), ("region", 3)]
    assert shown.groups[shown.baseline].label == "grpo"
    assert (shown.unfair, shown.notes) == ((), ())
    table = markdown(shown)
    assert "| metric | grpo (n=3) | region (n=3) |" in table
    assert "| task reward | 2.000 [-0.484, 4.484] |" in table  # mean and t interval of 1, 2, 3
    assert "Means of the training steps 4 to 8." in table
    assert "| validation accuracy, sayo/scenes | 1.000" in table
    assert "| a step (seconds) | 2.00 |" in table


def test_equal_seeds_are_paired(six):
    shown = compare(six)
    (said,) = verdict(shown)
    assert said.startswith("region: task reward clearly higher than grpo (+0.203 [+0.189, +0.218], paired by seed, n=3")
    unpaired = compare(six[:-1])
    assert unpaired.pairing == ("", "unpaired")
    assert "no clear difference" in verdict(unpaired)[0]


def test_one_run_each_says_that_one_seed_shows_nothing(six):
    shown = compare([six[0], six[3]])
    assert "n=1" in intro(shown)[0]
    assert "one seed cannot show a difference" in verdict(shown)[0]
    assert len(compare(six[:1]).groups) == 1


def test_groups_of_one_method_are_named_by_the_settings_in_which_they_differ(tmp_path):
    runs = [made(tmp_path / f"w{w}", "attn_region", 0, 1.0, weight=w) for w in (0.5, 1.0)]
    runs += [made(tmp_path / "other", "attn_region", 1, 1.0, weight=1.0, unused=0.9)]  # of a method that does not act
    shown = compare(runs)
    assert [(g.label, len(g.members)) for g in shown.groups] == [("region weight=0.5", 1), ("region weight=1.0", 2)]
    assert (shown.unfair, shown.notes) == ((), ())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"data": "/other"},
            "the data is not the same: data.train_files: /d/train.parquet (grpo) / /other/train.parquet",
        ),
        ({"model": "/m2"}, "the model is not the same: actor_rollout_ref.model.path: /m (grpo) / /m2 (region)"),
        ({"reward": "mine"}, "the reward function is not the same: reward.custom_reward_function.name"),
        ({"sizes": {"/d/train.parquet": 3}}, "files of the same name have different sizes"),
    ],
)
def test_runs_that_are_not_comparable_are_marked(tmp_path, given, said):
    sizes = {"sizes": {"/d/train.parquet": 2}} if "sizes" in given else {}
    shown = compare(
        [made(tmp_path / "g", "grpo", 0, 1.0, **sizes), made(tmp_path / "r", "attn_region", 0, 1.1, **given)]
    )
    (reason,) = shown.unfair
    assert said in reason
    assert "**These runs are not comparable:**" in markdown(shown)
    assert "These runs are not comparable:" in comparison_page(shown)


def test_other_settings_steps_and_versions_are_remarks(tmp_path):
    runs = [made(tmp_path / "g", "grpo", 0, 1.0), made(tmp_path / "r", "attn_region", 0, 1.1, 6, lr=2e-6, verl="0.9.0")]
    shown = compare(runs)
    assert shown.unfair == ()
    assert shown.steps == (2, 6)
    steps, settings, versions = shown.notes
    assert "different numbers of steps (g 8, r 6)" in steps
    assert "optim.lr: 1e-06 (grpo) / 2e-06 (region)" in settings
    assert versions == "Versions of verl differ: grpo 0.9.1; region 0.9.0."


def test_runs_without_a_configuration_are_groups_of_their_own_and_not_comparable(tmp_path):
    runs = [write_run(tmp_path / name, *(line(n, **GRPO) for n in range(1, 5))) for name in "ab"]
    shown = compare(runs)
    assert [group.label for group in shown.groups] == ["a", "b"]
    assert "not recorded (no run.yaml)" in shown.unfair[0]


def test_a_copy_of_the_data_in_another_folder_is_the_same_data(tmp_path):
    moved = {"data": "/elsewhere", "sizes": {"/elsewhere/train.parquet": 5, "/d/val.parquet": 5}}
    runs = [
        made(tmp_path / "g", "grpo", 0, 1.0, sizes={"/d/train.parquet": 5, "/d/val.parquet": 5}),
        made(tmp_path / "r", "attn_region", 0, 1.1, **moved),
    ]
    assert compare(runs).unfair == ()


def test_labels_group_runs_and_name_the_baseline(six):
    shown = compare(six, ["a", "a", "a", "b", "b", "c"], "b")
    assert [(group.label, len(group.members)) for group in shown.groups] == [("a", 3), ("b", 2), ("c", 1)]
    assert shown.groups[shown.baseline].label == "b"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"paths": [0, 0]}, "R08"),
        ({"paths": [0, 1], "labels": ["a"]}, "R09"),
        ({"paths": [0, 3], "baseline": "gpro"}, r"R10: .*did you mean 'grpo'"),
        ({"paths": [0, 1], "k": 0}, "R11"),
    ],
)
def test_options_that_do_not_fit_are_refused(six, given, code):
    with pytest.raises(SayoError, match=f"SAYO-{code}"):
        compare(**given | {"paths": [six[i] for i in given["paths"]]})


def test_nan_in_the_window_gives_no_mean_and_is_named(tmp_path):
    run = made(tmp_path / "g", "grpo", 0, 1.0)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    record["data"]["critic/score/mean"] = None
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(record)]) + "\n")
    shown = compare([run])
    assert "not measured" in verdict(shown)[0]
    assert "g: critic/score/mean: NaN (1 of 8)" in shown.notes


def test_the_command_writes_page_and_markdown(six, tmp_path, capsys):
    for run in (six[0], six[3]):
        recorded(run)
    page, tables = tmp_path / "out" / "c.html", tmp_path / "c.md"
    paths = list(map(str, six))
    assert main(["compare", *paths, "--out", str(page), "--markdown", str(tables), "--window", "3"]) == 0
    shown = capsys.readouterr().out
    assert str(page) in shown
    assert "task reward" in shown
    content = page.read_text()
    assert content.count('class="viewer"') == 2  # the same prompts side by side
    assert "grpo, step 10" in content
    assert tables.read_text().startswith("# Comparison of runs")
    assert main(["compare", *paths, "--baseline", "x"]) == 2


def test_labels_are_escaped_everywhere(six):
    evil = "<img src=x>[red]|*"
    shown = compare([six[0], six[3]], [evil, "b"])
    assert "<img" not in comparison_page(shown)
    assert "&lt;img src=x>[red]\\|\\* (n=1)" in markdown(shown)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_comparison(shown, console)
    assert evil in console.export_text()


def test_where_the_runs_looked_is_compared_with_chance_beside(six):
    for run in (six[0], six[3]):
        recorded(run)
    shown = compare([six[0], six[3]])
    table = markdown(shown)
    assert "| attention on the boxes, share of the attention to the image | 0.400 | 0.400 |" in table
    assert "| the same if every visual token got the same attention | 0.125 | 0.125 |" in table
    assert "Attention on the boxes is that of the recorded held-out prompts at step 10." in shown.notes
    recorded(six[3], facts={"query_row": "input"})
    assert "It was read at different layers or positions" in " ".join(compare([six[0], six[3]]).notes)


def test_prompts_with_other_boxes_are_not_shown_under_each_others_maps(six, monkeypatch):
    recorded(six[0])
    made_prompt = report_runs._prompt

    def moved(i):
        image = made_prompt(i).images[0]
        return replace(made_prompt(i), images=(replace(image, boxes=((0.5, 0.5, 1.0, 1.0),)),))

    monkeypatch.setattr(report_runs, "_prompt", moved)
    recorded(six[3])
    shown = compare([six[0], six[3]])
    assert 'class="viewer"' not in comparison_page(shown)
    assert "The recorded prompts are not the same" in " ".join(shown.notes)


def test_validation_is_compared_at_the_last_step_that_all_runs_have(tmp_path):
    runs = []
    for name, steps in (("a", (0, 3, 6)), ("b", (0, 3, 8))):
        lines = [line(n, **GRPO | ({VALIDATION: 0.1 * n} if n in steps else {})) for n in range(9)]
        runs.append(write_run(tmp_path / name, *lines, launch={"estimator": "grpo", "run_id": name}))
    shown = compare(runs, labels=["a", "b"])
    assert "| validation accuracy, sayo/scenes | 0.300 | 0.300 |" in re.sub(" +", " ", markdown(shown))
    told = "The runs were validated on sayo/scenes at different steps: step 3, the last that they have in common."
    assert told in shown.notes


def test_a_run_with_validation_alone_is_refused(tmp_path, six):
    only = write_run(tmp_path / "only", line(0, **{VALIDATION: 0.5}), launch={"estimator": "grpo", "run_id": "only"})
    with pytest.raises(SayoError, match=r"R12: a run has no training step to compare .*only"):
        compare([*six, only])
