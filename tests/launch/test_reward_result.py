"""What a reward gives, found before the run, and the form of answers that it reads."""

import json
import sys
import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import verl.utils.reward_score
from support.launch_config import files, refused, with_kwargs, write_rows

import sayo_verl.launch.reward_result
from sayo_verl.errors import SayoError
from sayo_verl.launch.answer_forms import EMPTY, Tried, check_forms, forms_in, read_form
from sayo_verl.launch.preflight import preflight
from sayo_verl.launch.settings import load_methods

PATH, MANAGER, MODEL = "reward.custom_reward_function.path", "reward.reward_manager", "reward.reward_model"
FAITHFUL = {"algorithm.adv_estimator": "attn_faithful"}  # needs to know which answers are correct
GRPO = {"algorithm.adv_estimator": "grpo"}
BOXED, ANSWER = "Answer in \\boxed{}.", "Answer as <answer> ... </answer>."


@pytest.fixture
def with_reward(make, tmp_path):
    """``with_reward(body, **values)``: a configuration with a reward function of the user's."""

    def changed(body, *, head="def", **values):
        (tmp_path / "mine.py").write_text(
            "class Mine:\n    async def run_single(self, data): ...\n"
            f"{head} compute_score(data_source, solution_str, ground_truth, extra_info):\n    {body}\n"
        )
        return make(**{PATH: "mine.py"} | values)

    return changed


def line(config, **kwargs):
    return dict(preflight(config, **kwargs))["reward gives"]


RIGHT = "float('<answer>' + ground_truth in solution_str)"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (f"return {{'score': 2 * {RIGHT}, 'acc': {RIGHT}}}", "acc, score; rewards of 0 to 2 for "),
        (f"return {{'score': 2 * {RIGHT}, 'acc': bool({RIGHT}), 'n': 1}}", "acc, n, score; "),
        (f"return {RIGHT}", "a number, which verl also calls acc (0, 1); rewards of 0 to 1 for "),
        (f"return {RIGHT} > 0", "a number, which verl also calls acc (0, 1); "),
        (f"return {{'score': 0.5, 'acc': 0.3 + 0.4 * {RIGHT}}}", "acc, score; "),  # a share of several answers
    ],
)
def test_what_a_function_returns_is_found_by_calling_it(with_reward, body, says):
    assert line(with_reward(body, **FAITHFUL)).startswith(says)


@pytest.mark.parametrize(
    ("body", "what", "got"),
    [
        (f"return {{'score': {RIGHT}}}", "does not return acc", "score"),
        (f"return 0.1 + 0.9 * {RIGHT}", "returns a number only", "0.1, 1"),
        (f"return {{'score': 1.0, 'acc': 2 * {RIGHT} - 1}}", "acc is out of range", "-1, 1"),
        (f"return {{'score': 1.0, 'acc': 1.0 if {RIGHT} else None}}", "acc is no number", "None"),
        ("return {'score': 1.0, 'acc': 'yes'}", "acc is no number", "'yes'"),
        ("return {'score': 1.0, 'acc': float('nan')}", "acc is no number", "nan"),
    ],
)
def test_a_method_that_needs_acc_is_refused_before_the_first_rollout(with_reward, body, what, got):
    error = refused(with_reward(body, **FAITHFUL), "L86")
    assert what in error.what
    assert error.got == got
    assert "sayo.correct_from" in error.fix
    preflight(with_reward(body, **FAITHFUL, **{"sayo.correct_from": 0.95}))
    preflight(with_reward(body))  # a method that does not need it
    preflight(with_reward(body, **FAITHFUL, **{"algorithm.attn.faithful.gate": False}))


@pytest.mark.parametrize(
    ("values", "head", "why"),
    [
        ({}, "async def", "async, so it may ask a service"),
        ({f"{MANAGER}.name": "rate_limited"}, "def", "may cost money"),
        (
            {f"{MANAGER}.source": "importlib", f"{MANAGER}.name": "Mine", f"{MANAGER}.module.path": "mine.py"},
            "def",
            "of your own",
        ),
    ],
)
def test_a_reward_that_is_not_called_is_asked_for(with_reward, values, head, why):
    body = "raise RuntimeError('called')"
    config = with_reward(body, head=head, **values, **GRPO)
    assert line(config) == f"not checked: {why}" or why in line(config)
    error = refused(with_reward(body, head=head, **values, **FAITHFUL), "L86")
    assert why in error.got
    assert "sayo.correct_from=acc" in error.fix
    for value in ("acc", 1):
        preflight(with_reward(body, head=head, **values, **FAITHFUL, **{"sayo.correct_from": value}))
    assert why in line(with_reward(body, head=head, **values, **FAITHFUL), dry_run=True)


def test_a_reward_model_gives_no_acc(make):
    model = {f"{MODEL}.enable": True, f"{MODEL}.model_path": "judge", PATH: None}
    error = refused(make(**model, **FAITHFUL), "L86")
    assert error.got == "a score"
    assert "sayo.correct_from" in error.fix
    assert "return" not in error.fix
    refused(make(**model, **FAITHFUL, **{"sayo.correct_from": "acc"}), "L86")
    assert "starts with the run" in line(make(**model, **FAITHFUL, **{"sayo.correct_from": 0.5}))
    refused(make(**model, **GRPO, **{f"{MODEL}.enable_resource_pool": True}), "L36")
    refused(make(**model, **GRPO, **{"algorithm.filter_groups": {"enable": True, "metric": "reward"}}), "L52")


def test_our_function_gives_acc_also_where_no_row_can_be_read(make, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    values = {"data.train_files": str(rows), "data.val_files": str(rows), "sayo.held_out": False}
    assert line(make(**values, **FAITHFUL)) == "not checked: no row can be tried"
    (tmp_path / "mine.py").write_text("def compute_score(**kwargs): return {'score': 1.0, 'acc': 1.0}\n")
    assert "no row can be tried" in refused(make(**values, **FAITHFUL, **{PATH: "mine.py"}), "L86").got


@pytest.mark.parametrize("value", ["score", True, float("nan"), [1]])
def test_another_source_of_correctness_is_refused(make, value):
    assert refused(make(**{"sayo.correct_from": value}), "L86").where == "sayo.correct_from"


@pytest.mark.parametrize("found", ["None", "'1'", "{'acc': 1}", "(1.0, 'why')"])
def test_a_result_without_a_score_is_refused(with_reward, found):
    error = refused(with_reward(f"return {found}"), "L87")
    assert error.got == repr(eval(found))  # noqa: S307 (a literal above)
    assert "row 0" in error.where


@pytest.mark.parametrize("found", ["np.float32(1)", "{'score': np.float32(1), 'acc': 1.0}", "np.float64(1)"])
def test_a_score_that_verl_cannot_assign_is_refused(with_reward, found):
    config = with_reward(f"import numpy as np; return {found}")
    if "float64" in found:
        assert "a number" in line(config)
        return
    error = refused(config, "L87")
    assert "TypeError: can't assign a numpy.float32" in error.got
    assert error.fix == "return float(...) of the score"


def test_errors_of_a_function_are_shown(with_reward):
    config = with_reward("return 1 / len(solution_str)")
    assert "more calls raised an error, and verl drops such responses: ZeroDivisionError" in line(config)
    assert "WARNING: the reward function raises KeyError" in line(with_reward("return extra_info['absent']", **GRPO))
    refused(with_reward("return extra_info['absent']", **FAITHFUL), "L86")


def test_a_function_that_takes_long_is_ended(with_reward, tmp_path, monkeypatch):
    monkeypatch.setattr(sayo_verl.launch.reward_result, "SECONDS", 0.3)
    called = tmp_path / "called"
    body = f"import time; open({str(called)!r}, 'a').write('x'); time.sleep(0.2); return 1.0"
    assert "takes more than 0.3 s" in line(with_reward(body))
    n = len(called.read_text())
    time.sleep(0.5)
    assert len(called.read_text()) == n > 0, "it is still called after the limit"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import sys; sys.exit(3)", "WARNING: the reward function raises SystemExit: 3"),
        ("import os; os._exit(3)", "WARNING: the reward function ends its process, exit code 3"),
    ],
)
def test_a_function_that_exits_is_reported(with_reward, body, says):
    assert says in line(with_reward(body))
    refused(with_reward(body, **FAITHFUL), "L86")


def test_the_call_can_be_left_out(with_reward, tmp_path):
    called = tmp_path / "called"
    body, off = f"open({str(called)!r}, 'a'); return 1.0", {"sayo.call_reward": False}
    assert line(with_reward(body, **off)) == "not checked: sayo.call_reward=False"
    error = refused(with_reward(body, **off, **FAITHFUL), "L86")
    assert "sayo.call_reward=False" in error.got
    assert "sayo.correct_from=acc" in error.fix
    preflight(with_reward(body, **off, **FAITHFUL, **{"sayo.correct_from": "acc"}))
    assert not called.exists()
    preflight(with_reward(body))
    assert called.exists()


def test_the_row_stays_as_it_is_and_verls_keys_are_there(with_reward, tmp_path):
    preflight(with_reward("assert extra_info.pop('num_turns') == 2; assert extra_info.pop('boxes'); return 1.0"))


def test_filtering_by_a_key_that_the_function_does_not_return_is_refused(with_reward):
    groups = {"algorithm.filter_groups": {"enable": True, "metric": "acc"}}
    error = refused(with_reward("return {'score': 1.0, 'right': 1}", **GRPO, **groups), "L52")
    assert error.wanted == "reward, right, score"
    assert "filter" not in line(with_reward("return 1.0", **GRPO, **groups))
    partly = line(with_reward(f"return 0.1 + 0.9 * {RIGHT}", **GRPO, **groups))
    assert partly.startswith("a number, which verl also calls acc (0.1, 1); the group filter compares this number")


GEO3K = "hiyouga/geometry3k"


@pytest.mark.parametrize(
    ("source", "truth", "question", "says"),
    [
        ("openai/gsm8k", "42", "", "a number, which verl also calls acc (0, 1); rewards of 0 to 1"),
        (GEO3K, "42", BOXED, "a number, which verl also calls acc (0, 0.1, 0.9, 1); rewards of 0 to 1"),
        ("math_dapo", "42", "", "acc, pred, score; rewards of -1 to 1"),
        ("lighteval/MATH", "42", BOXED, "a number, which verl also calls acc (0, 1); rewards of 0 to 1"),
        ("searchR1_nq", {"target": ["a"]}, "", "a number, which verl also calls acc (0); rewards of 0 to 0"),
    ],
)
def test_rules_of_verl_are_called_for_their_data_sources(make, tmp_path, source, truth, question, says):
    rows = files(tmp_path, source=source, truth=truth, question=question)
    assert line(make(**{PATH: None}, **rows, **GRPO)).startswith(says)


@pytest.mark.parametrize("source", ["numina_cn_k12", "apps"])
def test_a_rule_of_verl_that_runs_the_response_as_code_is_refused_and_not_called(make, tmp_path, source):
    rows = files(tmp_path, source=source, truth="42")
    assert refused(make(**{PATH: None}, **rows, **GRPO), "D78").got == source
    assert line(make(**rows, **GRPO))  # a reward function that is named does not call it


def test_programs_may_run_in_a_sandbox(make, tmp_path):
    rows = files(tmp_path, source="apps", truth="{}")
    sandbox = {"reward.sandbox_fusion.url": "http://sandbox.example"}
    assert line(make(**{PATH: None}, **sandbox, **rows, **GRPO)).startswith("not checked: no row can be tried")


def test_a_data_source_that_verl_does_not_know_is_refused(make, tmp_path):
    error = refused(make(**{PATH: None}), "L88")
    assert error.got == "sayo/scenes"
    assert "pkg://sayo_verl.reward" in error.fix
    mixed = write_rows(tmp_path / "mixed.parquet", boxes=None, source="openai/gsm8k")
    rows = pq.read_table(mixed).to_pylist()
    rows[9]["data_source"] = "mine"
    pq.write_table(pa.Table.from_pylist(rows), mixed)
    values = {PATH: None, **GRPO, **files(tmp_path, source="openai/gsm8k"), "data.train_files": str(mixed)}
    assert refused(make(**values), "L88").where.endswith("row 9")


def test_a_package_that_a_rule_of_verl_lacks_is_named(make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mathruler.grader", None)
    monkeypatch.delitem(sys.modules, "verl.utils.reward_score.geo3k", raising=False)
    monkeypatch.delattr(verl.utils.reward_score, "geo3k", raising=False)
    error = refused(make(**{PATH: None}, **files(tmp_path, source=GEO3K), **GRPO), "L87")
    assert error.fix == "pip install mathruler"


def test_correctness_by_verls_geometry_rule_needs_its_threshold(make, tmp_path):
    """0.9 of the score is correctness and 0.1 the form, and its acc is the score."""
    values = {PATH: None, **files(tmp_path, source=GEO3K, question=BOXED), **FAITHFUL}
    assert refused(make(**values), "L86").got == "0, 0.1, 0.9, 1"
    preflight(make(**values, **{"sayo.correct_from": 0.5}))


@pytest.mark.parametrize(
    ("path", "source", "question", "reads"),
    [
        ("pkg://sayo_verl.reward", "mine", BOXED, "<answer>"),
        (None, GEO3K, ANSWER, "\\boxed{}"),
        (None, "openai/gsm8k", BOXED, "####"),
        ("mine.py", "mine", BOXED, "<answer>"),
    ],
)
def test_prompts_that_ask_for_a_form_which_earns_nothing_are_refused(make, tmp_path, path, source, question, reads):
    (tmp_path / "mine.py").write_text(f"def compute_score(solution_str, ground_truth, **others): return {RIGHT}\n")
    rows = files(tmp_path, source=source, question=question)
    if source != "mine":
        rows = files(tmp_path, source=source, question=question, truth="42")
    error = refused(make(**{PATH: path}, **rows, **GRPO), "L89")
    assert error.wanted.startswith(f"{reads}: ")
    assert error.got.startswith("16 of 16 training prompts of ")
    both = files(tmp_path, source=source, question=f"{question} Or: {reads.replace('{}', '{x}')} 1", truth="42")
    preflight(make(**{PATH: path}, **both, **GRPO))


@pytest.mark.parametrize("question", [ANSWER, BOXED, f"{ANSWER} {BOXED}", "What?"])
def test_a_function_that_reads_several_forms_or_none_is_not_judged(with_reward, tmp_path, question):
    for body in ("return float(ground_truth in solution_str)", "return 1.0", "return -len(solution_str)"):
        preflight(with_reward(body, **files(tmp_path, source="mine", question=question)))


@pytest.mark.parametrize("closed", ["", " and '</think>' in solution_str"])
def test_a_reward_for_responses_after_an_opened_thought_is_read(with_reward, tmp_path, closed):
    body = f"return float('<answer>' + ground_truth in solution_str and '<think>' not in solution_str{closed})"
    assert "rewards of 0 to 1" in line(with_reward(body, **files(tmp_path, source="mine", question=ANSWER)))
    refused(with_reward(body, **files(tmp_path, source="mine", question=BOXED)), "L89")


def test_forms_are_counted_for_each_split(make, tmp_path):
    """All training prompts are wrong, but they are fewer than a half of all."""
    boxes = [[[0.0, 0.0, 0.5, 0.5]]]
    wrong = str(write_rows(tmp_path / "wrong.parquet", boxes=boxes, question=BOXED))
    right = str(write_rows(tmp_path / "right.parquet", boxes=boxes, question=ANSWER, rows=40))
    error = refused(make(**{"data.train_files": wrong, "data.val_files": right}), "L89")
    assert error.got.startswith("16 of 16 training prompts")
    swapped = {"data.train_files": right, "data.val_files": wrong}
    assert refused(make(**swapped), "L89").got.startswith("16 of 16 validation prompts")
    never = {"trainer.test_freq": 0, "trainer.val_before_train": False}
    assert line(make(**swapped, **never)).endswith(" synthetic responses")


def test_validation_rows_that_are_never_scored_are_not_tried(make, tmp_path):
    values = {PATH: None, **GRPO, **files(tmp_path, source="openai/gsm8k", truth="42")}
    values["data.val_files"] = str(write_rows(tmp_path / "other.parquet", boxes=None, source="mine"))
    assert refused(make(**values), "L88").where.endswith("other.parquet row 0")
    preflight(make(**values, **{"trainer.test_freq": -1, "trainer.val_before_train": False}))
    refused(make(**values, **{"trainer.test_freq": 5, "trainer.val_before_train": False}), "L88")


def test_the_forms_of_a_reward_of_form_alone_are_checked(make, tmp_path):
    """SAYO's own job gives nothing for a right answer."""
    config = with_kwargs(make(**files(tmp_path, question=BOXED)), accuracy_weight=0.0)
    assert "1 in it" in refused(config, "L89").wanted
    preflight(with_kwargs(make(**files(tmp_path, question=ANSWER)), accuracy_weight=0.0, format="released"))


def test_a_single_prompt_of_another_form_is_a_warning(make, tmp_path):
    few = write_rows(tmp_path / "few.parquet", boxes=[[[0.0, 0.0, 0.5, 0.5]]], question=ANSWER)
    rows = pq.read_table(few).to_pylist()
    rows[5]["prompt"][0]["content"] = f"<image>{BOXED}"
    pq.write_table(pa.Table.from_pylist(rows), few)
    warned = line(make(**{"data.train_files": str(few)}))
    assert (
        "WARNING: 1 of 16 training prompts of 'sayo/scenes' ask for \\boxed{}, and the reward reads <answer>" in warned
    )
    assert warned.endswith("few.parquet row 5)")


def test_forms_are_found_in_a_prompt_as_it_is_stored():
    prompt = [{"role": "user", "content": [{"type": "text", "text": r"Put it in \boxed{}."}]}]
    assert forms_in(str(prompt)) == forms_in(json.dumps(prompt)) == ("\\boxed{}",)
    assert forms_in("<answer> or #### 5\nAnswer: 5") == ("<answer>", "####", "Answer:")
    assert forms_in("the answer: a boxed set") == ("Answer:",)


@pytest.mark.parametrize(
    ("scores", "named", "read"),
    [
        ({EMPTY: 0, "<answer>": 1, "\\boxed{}": 0}, ["\\boxed{}"], "<answer>"),
        ({EMPTY: -1, "<answer>": -1, "\\boxed{}": 1}, ["<answer>"], "\\boxed{}"),
        ({EMPTY: 0, "<answer>": 1, "\\boxed{}": 0}, ["\\boxed{}", "<answer>"], None),
        ({EMPTY: 0, "<answer>": 0, "\\boxed{}": 0}, ["<answer>"], None),
        ({EMPTY: 1, "<answer>": 1, "\\boxed{}": 1}, ["<answer>"], None),
        ({"<answer>": 1, "\\boxed{}": 0}, ["\\boxed{}"], None),  # the call for the empty response raised
        ({EMPTY: 0, "<answer>": 1}, ["\\boxed{}"], None),
    ],
)
def test_a_form_is_refused_only_if_it_earns_nothing_and_another_does(scores, named, read):
    assert read_form(scores, named) == read


def test_rows_that_disagree_are_not_refused():
    asked = ("mine", ("\\boxed{}",))
    tried = [
        Tried(asked, "row 0", {EMPTY: 0, "<answer>": 1, "\\boxed{}": 0}),
        Tried(asked, "row 1", {EMPTY: 0, "<answer>": 1, "\\boxed{}": 1}),
    ]
    assert check_forms(tried, Counter({asked: 2}), fix="") == []
    with pytest.raises(SayoError, match="SAYO-L89"):
        check_forms(tried[:1], Counter({asked: 2}), fix="")
    assert check_forms(tried[:1], Counter({asked: 2}), fix="", template="Put it in <answer>.") == []


@pytest.fixture
def oracle(repo):
    load_methods([str(repo / "recipe" / "oracle" / "oracle.py")])
    return {"algorithm.adv_estimator": "attn_oracle"}


def test_a_field_that_a_method_reads_must_be_among_those_that_the_reward_reports(with_reward, oracle):
    gives = f"'score': {RIGHT}, 'acc': {RIGHT}"
    assert line(with_reward(f"return {{{gives}, 'walk_marks': '.P'}}", **oracle)).startswith("acc, score, walk_marks; ")
    error = refused(with_reward(f"return {{{gives}}}", **oracle), "L86")
    assert "reads walk_marks" in str(error)
    assert error.got == "acc, score"


def test_a_reward_model_reports_no_field(make, oracle):
    model = {f"{MODEL}.enable": True, f"{MODEL}.model_path": "judge", PATH: None}
    error = refused(make(**model, **oracle, **{"sayo.correct_from": 0.5}), "L86")
    assert error.got == "a score, of a reward model"


def test_a_field_of_a_reward_that_is_not_called_is_left_to_the_first_step(with_reward, oracle):
    body = f"return {{'score': {RIGHT}, 'acc': {RIGHT}}}"
    assert "sayo.call_reward=False" in line(
        with_reward(body, **oracle, **{"sayo.call_reward": False, "sayo.correct_from": "acc"})
    )
