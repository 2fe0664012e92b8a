"""Refusals of the reward before a run: its function, settings and manager."""

import asyncio
import importlib

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from support.launch_config import add, composed, files, refused, with_kwargs
from transformers import AutoTokenizer

import sayo_verl.launch.reward_check
import sayo_verl.reward
import sayo_verl.reward.formula
from sayo_verl.errors import SayoError
from sayo_verl.launch.preflight import preflight
from sayo_verl.launch.reward_function import is_ours
from sayo_verl.launch.unread_keys import KEYS, KWARGS
from sayo_verl.methods import METHODS
from sayo_verl.reward import compute_score

PATH, NAME, MANAGER = (
    f"reward.{key}" for key in ("custom_reward_function.path", "custom_reward_function.name", "reward_manager.name")
)


GRPO = {"algorithm.adv_estimator": "grpo"}


@pytest.fixture
def built_in(tmp_path):
    """verl's own rule, and rows of a data source that it knows."""
    return {PATH: None, **files(tmp_path, source="openai/gsm8k")}


@pytest.mark.parametrize(
    ("key", "value", "today"),
    [
        ("custom_reward_function.path", "reward.py", "reward.custom_reward_function.path"),
        ("reward_model.reward_manager", "dapo", "reward.reward_manager.name"),
        ("reward_model.enable", True, "reward.reward_model.enable"),
        ("sandbox_fusion.url", "http://here", "reward.sandbox_fusion.url"),
    ],
)
def test_a_key_that_verl_ignores_is_refused(make, key, value, today):
    error = refused(make(**{key: value, **GRPO}), "L11")
    assert (error.where, error.got, error.fix) == (key, value, f"use {today}")


def test_a_missing_reward_file_is_refused(make, tmp_path, built_in):
    error = refused(make(**{PATH: "absent.py"}), "L19")
    assert (error.where, error.got) == (PATH, "absent.py")
    (tmp_path / "mine.py").write_text("def compute_score(**kwargs): return 1.0\n")
    for path in ("mine.py", "file://mine.py"):
        assert dict(preflight(make(**{PATH: path})))["reward"].startswith(f"{path}:compute_score")
    assert "built-in" in dict(preflight(make(**built_in)))["reward"]
    assert "; judge text" in dict(preflight(make()))["reward"]


@pytest.mark.parametrize("text", ["import absent_package", "def compute_score(:", "1 / 0"])
def test_a_reward_file_that_does_not_load_is_refused(make, tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    assert "mine.py" in refused(make(**{PATH: "mine.py"}), "L19").got
    assert "NOT CHECKED" in dict(preflight(make(**{PATH: "mine.py"}), dry_run=True))["reward"]
    refused(make(**{PATH: "pkg://sayo_verl.rewards"}), "L19")


def test_an_unknown_reward_function_suggests_the_right_one(make, tmp_path):
    error = refused(make(**{NAME: "compute_scores"}), "L35")
    assert error.where == NAME
    assert "did you mean 'compute_score'?" in str(error)
    (tmp_path / "mine.py").write_text("import re\ncompute_score = 3\ndef my_reward(**kwargs): return 1.0\n")
    assert "my_reward" in refused(make(**{PATH: "mine.py"}), "L35").wanted
    preflight(make(**{PATH: "mine.py", NAME: "my_reward"}))


@pytest.mark.parametrize(
    ("head", "kwargs", "code", "named"),
    [
        ("data_source, solution_str, ground_truth, extra_info=None", {}, None, ""),
        ("data_source, solution_str, ground_truth, extra_info, bonus=1", {"bonus": 2}, None, ""),
        ("solution_str, **others", {"anything": 2}, None, ""),
        ("data_source, solution_str, ground_truth", {}, "L35", "extra_info"),
        ("solution, truth", {}, "L35", "solution_str"),
        ("data_source, solution_str, ground_truth, /, extra_info", {}, "L35", "data_source"),
        ("data_source, solution_str, ground_truth, extra_info, bonus", {}, "L35", "bonus"),
        ("data_source, solution_str, ground_truth, extra_info, bonus=1", {"bonsu": 2}, "L34", "did you mean 'bonus'?"),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_what_a_function_of_the_users_takes(make, tmp_path, head, kwargs, code, named, kind):
    (tmp_path / "mine.py").write_text(f"{kind} compute_score({head}): return 1.0\n")
    config = with_kwargs(make(**{PATH: "mine.py"}), **kwargs)
    if code is None:
        preflight(config)
    else:
        assert named in str(refused(config, code))


ASYNC = "import asyncio, functools\nasync def inner(**kwargs): return 1.0\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("compute_score = max", "without a signature"),
        ("class compute_score:\n  def __init__(self, **kwargs): ...", "a class"),
        ("class C:\n  async def __call__(self, **kwargs): return 1.0\ncompute_score = C()", "takes the coroutine"),
        ("@functools.wraps(inner)\ndef compute_score(**kwargs): return inner(**kwargs)", "takes the coroutine"),
        ("class C:\n  def __call__(self, **kwargs): return 1.0\ncompute_score = C()", None),
        ("compute_score = functools.partial(inner, x=1)", None),
        ("@functools.wraps(inner)\nasync def compute_score(**kwargs): return await inner(**kwargs)", None),
        ("def compute_score(**kwargs): return asyncio.run(inner(**kwargs))", None),
    ],
)
def test_a_reward_that_verl_would_not_call_or_await_is_refused(make, tmp_path, text, named):
    (tmp_path / "mine.py").write_text(ASYNC + text)
    config = make(**{PATH: "mine.py"})
    if named is None:
        preflight(config)
    else:
        assert named in str(refused(config, "L35"))


def test_an_async_reward_is_refused_with_the_manager_remote(make, tmp_path):
    (tmp_path / "mine.py").write_text(ASYNC)
    values = {PATH: "mine.py", NAME: "inner"}
    assert refused(make(**values, **{MANAGER: "remote", "ray_kwargs.ray_init.num_cpus": 100}), "L36").where == MANAGER
    preflight(make(**values))


def test_a_misspelt_setting_suggests_the_right_one(make):
    error = refused(with_kwargs(make(), acuracy_weight=0.5), "L34")
    assert error.where == f"{KWARGS}.acuracy_weight"
    assert "did you mean 'accuracy_weight'?" in str(error)
    assert "reward_router_address" not in error.wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_weight", -1.0),
        ("accuracy_weight", "1"),
        ("accuracy_weight", True),
        ("accuracy_weight", float("nan")),
        ("judge", "maths"),
        ("format", "ours"),
        ("think_opened", "yes"),
        ("length_tokenizer", 3),
        ("length_tokenizer", ""),
    ],
)
def test_a_value_out_of_range(make, key, value):
    error = refused(with_kwargs(make(), **{key: value}), "L34")
    assert (error.where, error.got) == (f"{KWARGS}.{key}", repr(value))
    with pytest.raises(sayo_verl.reward.SayoError, match="SAYO-L34"):
        compute_score("", "", "red", **{key: value})


@pytest.mark.parametrize("path", ["/absent/model", "~/model", "model/absent", "models/of/mine"])
def test_a_path_without_a_tokenizer_is_refused(make, path):
    config = with_kwargs(make(), length_tokenizer=path)
    assert refused(config, "L34").got == path
    assert f"{path} - NOT THERE YET" in dict(preflight(config, dry_run=True))["reward"]
    preflight(with_kwargs(make(), length_tokenizer="nobody/nothing"))


def test_settings_that_are_not_a_group_are_refused(make):
    refused(add(make(), KWARGS, [1]), "L34")
    preflight(add(make(), KWARGS, None))


@pytest.mark.parametrize("key", ["ground_truth", "solution_str", "data_source", "extra_info", "reward_router_address"])
def test_a_setting_does_not_replace_what_verl_passes(make, tmp_path, key):
    (tmp_path / "mine.py").write_text("def compute_score(**kwargs): return 1.0\n")
    for path in ("pkg://sayo_verl.reward", "mine.py"):
        error = refused(with_kwargs(make(**{PATH: path}), **{key: "red"}), "L34")
        assert (error.where, error.got) == (f"{KWARGS}.{key}", "'red'")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("reward.custom_reward_function.reward_kwrgs.accuracy_weight", "reward_kwargs"),
        ("reward.custom_reward_function.pth", "path"),
        ("reward.reward_kwargs.x", None),
        ("reward.num_worker", "num_workers"),
        ("reward.reward_manager.reward_kwargs.x", None),
        ("reward.reward_manager.nam", "name"),
        ("sayo.preflight_image", "preflight_images"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(make, key, near):
    error = refused(add(make(), key, 3), "L34")
    assert key.startswith(error.where)
    assert (f"did you mean {near!r}?" in str(error)) == (near is not None)


def test_keys_of_a_manager_are_taken_with_that_manager(make, base, built_in):
    for group in ("reward", "reward.custom_reward_function", "reward.reward_manager"):
        composed_keys = set(OmegaConf.select(base, group))
        assert composed_keys == set(KEYS[group]) - {"reward_kwargs"}
    preflight(add(make(**{MANAGER: "dapo"}), "reward.reward_kwargs.max_resp_len", 3))
    refused(add(make(**{MANAGER: "dapo"}), "reward.reward_kwargs.max_resp_length", 3), "L34")
    preflight(add(make(**{MANAGER: "rate_limited", **built_in, **GRPO}), "reward.timeout", 3))
    refused(add(make(), "reward.timeout", 3), "L34")


def test_a_jobs_settings_of_our_function_do_not_reach_another_one(make, tmp_path):
    (tmp_path / "geo.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info, x=0): return 1.0\n"
    )
    job = {"format_weight": 1.0, "accuracy_weight": 0.0}
    config = with_kwargs(make(**{PATH: "geo.py"}), **job, x=2)
    plan = dict(preflight(config, given={PATH, f"{KWARGS}.x"}))["reward"]
    assert plan == (
        "geo.py:compute_score {'x': 2}; without the job's settings of sayo_verl.reward (format_weight, accuracy_weight)"
    )
    assert dict(config.reward.custom_reward_function.reward_kwargs) == {"x": 2}, "the run gets the same"
    with pytest.raises(SayoError, match=rf"SAYO-L34: .*'format_weight'.* ~{KWARGS}.format_weight removes"):
        preflight(with_kwargs(make(**{PATH: "geo.py"}), **job), given={PATH, f"{KWARGS}.format_weight"})
    refused(with_kwargs(make(**{PATH: "geo.py"}), **job), "L34")  # path and settings of one job's file
    ours = with_kwargs(make(), **job | {"accuracy_weight": 1.0})
    assert "without" not in dict(preflight(ours, given={PATH}))["reward"]


def test_the_judge_math_without_its_package_is_refused(make, monkeypatch):
    config = with_kwargs(make(), judge="math")
    preflight(config)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find_spec(name))
    error = refused(config, "L32")
    assert "pip install 'sayo-verl[math]'" in error.fix
    preflight(make())


def estimator(name, **values):
    return {"algorithm.adv_estimator": name, **values}


@pytest.mark.parametrize(
    ("values", "format_weight", "remark"),
    [
        (GRPO, 1.0, None),
        (GRPO, 0.0, None),
        (estimator("rloo"), 1.0, None),
        (estimator("attn_dual"), 1.0, None),
        (estimator("attn_anchor"), 1.0, None),
        (estimator("attn_region", **{"algorithm.attn.region.weight": 0.0}), 1.0, None),
        (estimator("attn_region", **{"algorithm.attn.region.per_token": True}), 1.0, None),
        (
            estimator("attn_region"),
            1.0,
            "attention and format only: the reward does not depend on the answer, the",
        ),
        (
            estimator("attn_region"),
            0.0,
            "attention only: the reward does not depend on the answer, the paper's",
        ),
        (estimator("attn_mix", **{"algorithm.attn.mix": ["region", "dual"]}), 1.0, "attention and format only"),
        (estimator("attn_mix", **{"algorithm.attn.mix": ["dual"]}), 1.0, None),
        (estimator("attn_faithful"), 1.0, ""),
        (estimator("attn_sensitivity"), 1.0, None),
        (estimator("attn_evidence", **{"algorithm.attn.evidence.replaced": 0.0}), 1.0, ""),
    ],
)
def test_a_reward_that_does_not_depend_on_the_answer_is_refused_unless_the_method_gives_one(
    make, values, format_weight, remark
):
    weights = {"format_weight": format_weight, "accuracy_weight": 0.0}
    if remark is None:
        error = refused(with_kwargs(make(**values), **weights), "L31")
        assert error.where == f"{KWARGS}.accuracy_weight"
        assert "accuracy_weight=1" in error.fix
        assert ("format alone" if format_weight else "0 for every response") in str(error)
        preflight(with_kwargs(make(**values), **weights | {"accuracy_weight": 1.0}))
    else:
        plan = dict(preflight(with_kwargs(make(**values), **weights)))["reward"]
        assert remark in plan
        assert ("does not depend on the answer" in plan) == bool(remark)


@pytest.mark.parametrize(
    "path", ["{file}", "file://{file}", "pkg://sayo_verl.reward.__init__", "pkg://sayo_verl/reward", "alias.py"]
)
def test_our_function_is_known_under_every_path(make, tmp_path, path):
    (tmp_path / "alias.py").write_text("from sayo_verl.reward import compute_score\n")
    path = path.format(file=sayo_verl.reward.__file__)
    assert is_ours(make(**{PATH: path}))
    refused(with_kwargs(make(**{PATH: path}, **GRPO), accuracy_weight=0.0), "L31")


def test_a_function_of_the_users_is_not_ours_and_is_loaded_once(make, tmp_path):
    assert not is_ours(make(**{PATH: None}))
    assert not is_ours(make(**{PATH: "absent.py"}))
    assert not is_ours(make(**{NAME: "length_factor"}))
    count = "from pathlib import Path\nwith Path('loads').open('a') as file:\n    file.write('x')\n"
    (tmp_path / "mine.py").write_text(count + "def compute_score(**kwargs): return 1.0\n")
    config = make(**{PATH: "mine.py"})
    preflight(config)
    assert not is_ours(config)
    assert (tmp_path / "loads").read_text() == "x"


def test_a_reward_that_takes_the_place_of_correctness_must_know_what_correctness_is_worth(make):
    values = estimator("attn_evidence")
    error = refused(with_kwargs(make(**values), accuracy_weight=0.5), "A24")
    assert error.where == "algorithm.attn.evidence.replaced"
    assert "replaced=0.5" in error.fix
    refused(with_kwargs(make(**values), accuracy_weight=0.0), "A24")
    preflight(with_kwargs(make(**values, **{"algorithm.attn.evidence.replaced": 0.5}), accuracy_weight=0.5))
    preflight(with_kwargs(make(**values, **{"algorithm.attn.evidence.weight": 0.0}), accuracy_weight=0.5))
    mixed = estimator("attn_mix", **{"algorithm.attn.mix": ["dual", "evidence"]})
    refused(with_kwargs(make(**mixed), accuracy_weight=2.0), "A24")


def test_the_plan_names_the_passes_with_a_changed_image(make):
    plan = dict(preflight(make(**estimator("attn_evidence"))))
    assert plan["changed images"].startswith("4 further log-prob passes of the same responses in every update")
    others = [f"elsewhere.grey.s0.d{draw}" for draw in range(3)]
    assert plan["changed images"].endswith(f": {', '.join(['region.grey', *others])}")
    assert "a further log-prob pass" in dict(preflight(make(**estimator("attn_faithful"))))["changed images"]
    assert "changed images" not in dict(preflight(make(**estimator("attn_dual"))))


def test_every_method_has_a_case_above(repo):
    shipped = {name for name, cls in METHODS.items() if cls.__module__.startswith("sayo_verl.")}
    assert shipped == {"attn_region", "attn_dual", "attn_anchor", "attn_faithful", "attn_sensitivity", "attn_evidence"}


def test_a_reward_of_format_alone_is_refused_in_sayos_job(repo):
    config = composed(repo, "+job=sayo_qwen3vl_8b", "+method=grpo", f"{KWARGS}.accuracy_weight=0")
    refused(config, "L31", dry_run=True)


def test_an_unknown_manager_suggests_the_right_one(make):
    assert "did you mean 'naive'?" in str(refused(make(**{MANAGER: "naiv"}), "L36"))
    refused(make(**{MANAGER: "prime", **GRPO}), "L36")


def test_a_reward_model_beside_our_function_is_refused(make, tmp_path, built_in):
    model = {"reward.reward_model.enable": True, "reward.reward_model.model_path": "judge"}
    assert refused(make(**model), "L36").where == "reward.reward_model.enable"
    (tmp_path / "mine.py").write_text("def compute_score(**kwargs): return 1.0\n")
    refused(make(**model, **{PATH: "mine.py"}), "L36")
    preflight(make(**model, **{PATH: "mine.py", "reward.reward_model.enable_resource_pool": True}))
    assert dict(preflight(make(**model, **built_in)))["reward"] == "the score of the reward model judge"
    unnamed = make(**{"reward.reward_model.enable": True}, **built_in)
    assert refused(unnamed, "L36").where == "reward.reward_model.model_path"
    (tmp_path / "mine.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info): return 1.0\n"
    )
    error = refused(make(**model, **{PATH: "mine.py", "reward.reward_model.enable_resource_pool": True}), "L35")
    assert "reward_router_address" in str(error)


@pytest.mark.parametrize(
    ("source", "path", "name", "where", "named"),
    [
        ("importlb", "mine.py", "Mine", "source", "no such source"),
        ("importlib", None, "Mine", "module.path", "no file is named"),
        ("importlib", "absent.py", "Mine", "module.path", "FileNotFoundError"),
        ("importlib", "mine.py", "Other", "name", "no such class"),
        ("importlib", "mine.py", "Wrong", "name", "async def run_single"),
        ("importlib", "mine.py", "Mine", None, ""),
    ],
)
def test_a_manager_of_the_users_is_loaded_before_the_run(make, tmp_path, source, path, name, where, named):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n  async def run_single(self, data): ...\nclass Wrong:\n  def run_single(self, data): ...\n"
    )
    keys = {"source": source, "name": name, "module.path": path}
    config = make(**{f"reward.reward_manager.{key}": value for key, value in keys.items()})
    if where is None:
        preflight(config)
        return
    error = refused(config, "L36")
    assert error.where == f"reward.reward_manager.{where}"
    assert named in str(error)


RIGHT = {"score": 2.0, "acc": 1.0, "format": 1.0}


MANAGERS = {  # name: whether the launcher takes it with sayo_verl.reward
    "naive": True,
    "dapo": True,
    "gdpo": True,
    "remote": True,
    "rate_limited": False,  # reward 0 for every error, and no word
}


@pytest.fixture
def managers():
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

    return REWARD_MANAGER


def test_each_manager_of_verl_is_in_the_table(managers):
    assert set(managers) == set(MANAGERS)


@pytest.mark.parametrize("name", MANAGERS)
def test_a_manager_hands_on_what_the_function_returns(name, make, managers, random_policy, monkeypatch, built_in):
    if not MANAGERS[name]:
        error = refused(make(**{MANAGER: name}), "L36")
        assert error.where == MANAGER
        preflight(make(**{MANAGER: name, **built_in, **GRPO}))
        return
    preflight(make(**{MANAGER: name, "ray_kwargs.ray_init.num_cpus": 100}))
    if name == "remote":
        _stand_in_for_ray(monkeypatch)
    assert _run_manager(managers[name], random_policy, "red") == {"reward_score": 2.0, "reward_extra_info": RIGHT}
    with pytest.raises(sayo_verl.reward.SayoError, match=r"SAYO-D70: .*null"):
        _run_manager(managers[name], random_policy, None)


def test_rate_limited_hides_an_error(managers, random_policy):
    found = _run_manager(managers["rate_limited"], random_policy, None)
    assert found["reward_score"] == 0.0


@pytest.mark.parametrize("name", MANAGERS)
def test_each_manager_takes_a_number_as_acc(name, managers, random_policy, monkeypatch):
    """``sayo_verl.launch.reward_result`` relies on it."""
    if name == "remote":
        _stand_in_for_ray(monkeypatch)
    found = _run_manager(managers[name], random_policy, "red", lambda **_: 0.25)
    assert found == {"reward_score": 0.25, "reward_extra_info": {"acc": 0.25}}


def _run_manager(cls, policy, truth, function=compute_score):
    from verl import DataProto

    tokenizer = AutoTokenizer.from_pretrained(policy)
    ids = torch.tensor([tokenizer.encode("<think> red .</think><answer> red</answer>")])
    extra = np.array([{}], dtype=object)
    data = DataProto.from_dict(
        {"responses": ids, "attention_mask": torch.ones_like(ids)},
        non_tensors={
            "data_source": np.array(["a"], dtype=object),
            "extra_info": extra,
            "reward_model": np.array([{"ground_truth": truth}], dtype=object),
        },
    )
    config = OmegaConf.create({"reward": {"num_workers": 1}, "trainer": {"experiment_name": "x"}})

    async def run():
        cls._class_initialized = False
        return await cls(config=config, tokenizer=tokenizer, compute_score=function).run_single(data)

    return asyncio.run(run())


def _stand_in_for_ray(monkeypatch):
    """A worker of the manager "remote" in this process."""
    from verl.experimental.reward_loop.reward_manager import remote

    class Worker:
        @classmethod
        def options(cls, **_):
            return cls

        @classmethod
        def remote(cls, function):
            worker = cls()

            async def call(**kwargs):
                return function(**kwargs)

            worker.compute_score = type("Method", (), {"remote": staticmethod(call)})
            return worker

    monkeypatch.setattr(remote, "RewardComputeWorker", Worker)
    node = type("Context", (), {"get_node_id": staticmethod(lambda: "0" * 56)})
    monkeypatch.setattr(remote.ray, "get_runtime_context", lambda: node)


def test_the_manager_remote_needs_cpus_of_its_own(make):
    values = {MANAGER: "remote", "reward.num_workers": 8}
    assert "64 of the reward manager" in str(refused(make(**values, **{"ray_kwargs.ray_init.num_cpus": 60}), "L14"))
