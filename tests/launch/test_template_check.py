"""The chat template of a run: the think block that it opens, and tags that decoding drops."""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support.launch_config import add, refused, with_kwargs
from transformers import AutoTokenizer

from sayo_verl.launch.preflight import preflight
from sayo_verl.launch.template_check import configure
from sayo_verl.launch.unread_keys import KWARGS

OPENED = "<think>\n"


CLOSED = "<think>\n\n</think>\n\n"


@pytest.fixture
def template(make, random_policy, tmp_path):
    """``template(generation)``: a configuration whose policy's template ends the generation prompt so."""

    def changed(generation, **kwargs):
        folder = tmp_path / f"policy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(random_policy, folder)
        file = folder / "chat_template.jinja"
        text = file.read_text()
        assert text.count("assistant\\n'") == 1
        shown = generation.replace("\n", "\\n")
        file.write_text(text.replace("assistant\\n'", f"assistant\\n{shown}'"))
        return with_kwargs(make(**{"actor_rollout_ref.model.path": str(folder)}), **kwargs)

    return changed


def think_opened(config):
    preflight(config)
    configure(config)
    return OmegaConf.select(config, f"{KWARGS}.think_opened")


@pytest.mark.parametrize(
    ("generation", "plan", "opened"),
    [
        ("", "opens no <think>", None),
        ("<think>", "opens <think>: responses are graded as", True),
        (OPENED, "opens <think>: responses are graded as", True),
        (CLOSED, "adds a closed think block", None),
    ],
    ids=ascii,
)
def test_an_opened_think_block_is_found_and_set(template, generation, plan, opened):
    config = template(generation)
    assert plan in dict(preflight(config))["template"]
    assert think_opened(config) is opened
    assert plan in dict(preflight(config))["template"]  # what is set agrees with the template


def test_the_settings_of_the_template_count(template):
    config = template("")
    text = (Path(config.actor_rollout_ref.model.path) / "chat_template.jinja").read_text()
    switched = text + "{%- if add_generation_prompt and thinking -%}{{- '<think>' -}}{%- endif -%}"
    OmegaConf.update(config, "actor_rollout_ref.model.custom_chat_template", switched)
    assert think_opened(config) is None
    add(config, "data.apply_chat_template_kwargs.thinking", True)
    assert think_opened(config) is True


def test_the_plan_of_attn_faithful_says_whether_the_model_is_anchored(template):
    config = template("<Focus>")
    OmegaConf.update(config, "algorithm.adv_estimator", "attn_faithful")
    assert dict(preflight(config))["anchoring"].startswith("prompts end in <Focus>")
    plain = (Path(config.actor_rollout_ref.model.path) / "chat_template.jinja").read_text().replace("<Focus>", "")
    OmegaConf.update(config, "actor_rollout_ref.model.custom_chat_template", plain)
    assert dict(preflight(config))["anchoring"].startswith("prompts do not end in <Focus>: reinforcement alone")
    for name, mix, shown in (("attn_mix", ["region", "faithful"], True), ("attn_region", [], False)):
        OmegaConf.update(config, "algorithm.adv_estimator", name)
        OmegaConf.update(config, "algorithm.attn.mix", mix)
        assert ("anchoring" in dict(preflight(config))) == shown


def test_a_think_opened_that_contradicts_the_template_is_refused(template):
    for generation, wrong in ((OPENED, False), ("", True), (CLOSED, True)):
        error = refused(template(generation, think_opened=wrong), "L33")
        assert (error.where, error.got) == (f"{KWARGS}.think_opened", wrong)
    assert think_opened(template(OPENED, think_opened=True)) is True
    assert think_opened(template("", think_opened=False)) is False


def test_the_released_format_reads_no_think_block(template):
    config = template(OPENED, format="released")
    assert dict(preflight(config))["template"] == "format=released reads no think block"
    assert think_opened(config) is None


@pytest.mark.parametrize("kwargs", [{}, {"format": "released"}])
def test_a_template_that_opens_the_answer_block_is_refused(template, kwargs):
    assert "<answer>" in refused(template("<think>\n\n</think>\n<answer>", **kwargs), "L33").got
    preflight(template("<answer>x</answer>", **kwargs))


def test_a_template_that_divides_by_zero_is_not_checked(template):
    config = template("")
    text = "{%- if add_generation_prompt -%}{{- 1 // 0 -}}{%- endif -%}"
    OmegaConf.update(config, "actor_rollout_ref.model.custom_chat_template", text)
    assert "not checked: no prompt can be rendered here (ZeroDivisionError" in dict(preflight(config))["template"]


def test_a_tag_that_decoding_drops_is_refused(template):
    config = template("")
    folder = config.actor_rollout_ref.model.path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(folder)
    assert refused(config, "L33").got == "<think>"
    preflight(with_kwargs(config, format="released"))


def test_a_model_that_is_not_here_is_said_to_be_unchecked(make):
    config = make(**{"actor_rollout_ref.model.path": "nobody/nothing"})
    assert dict(preflight(config, dry_run=True))["template"] == "not checked: the model is not on this machine"
    settings = with_kwargs(config, think_opened=True)
    configure(settings)
    assert OmegaConf.select(settings, f"{KWARGS}.think_opened") is True
    line = dict(preflight(make()))["template"]  # a folder without a tokenizer
    assert "no prompt can be rendered" in line
    assert line[-2] in ".!?" or line.endswith("[...])"), "no sentence is cut without a mark"


def test_another_reward_function_has_no_think_block(template, tmp_path):
    config = template(OPENED)
    (tmp_path / "mine.py").write_text("def compute_score(**kwargs): return 1.0\n")
    config.reward.custom_reward_function.path = "mine.py"
    assert dict(preflight(config))["template"] == "-"
    configure(config)
    assert OmegaConf.select(config, KWARGS) is None
