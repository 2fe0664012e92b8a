"""Settings of the methods: composed from their classes, read back, and refused."""

import dataclasses

import pytest
from omegaconf import OmegaConf
from support.launch_config import MESSAGE, composed, refused

import sayo_verl.launch.data_check
import sayo_verl.launch.memory
import sayo_verl.launch.memory_check
import sayo_verl.launch.model_check
import sayo_verl.launch.preflight
import sayo_verl.launch.resources
import sayo_verl.launch.settings
import sayo_verl.models.families
from sayo_verl.errors import SayoError
from sayo_verl.launch.preflight import check_estimator, preflight
from sayo_verl.launch.settings import load_methods, method_from_config, settings_from_config, unused_settings
from sayo_verl.methods import METHODS, DualConfig, Mix, RegionMethod, register_method
from sayo_verl.methods.group import SPREAD_FLOOR


def test_the_composed_settings_are_the_methods_defaults(base):
    assert check_estimator(base) == RegionMethod()
    attn = OmegaConf.to_container(base.algorithm.attn)
    assert attn.pop("mix") == []
    assert attn.pop("spread_floor") == SPREAD_FLOOR
    shipped = {name: cls for name, cls in METHODS.items() if cls.__module__.startswith("sayo_verl.")}
    assert set(attn) == {name.removeprefix("attn_") for name in shipped}
    for name, method in shipped.items():
        assert set(attn[name.removeprefix("attn_")]) == set(vars(method()))  # `--cfg job` shows every key
        assert method_from_config(name, attn) == method()


def test_a_file_of_configs_method_holds_only_what_differs_from_the_class(repo):
    """``mix`` is not a setting of a class. A copied default in a file would win over a changed class."""
    files = sorted((repo / "configs" / "method").glob("*.yaml"))
    assert {f"attn_{file.stem}" for file in files} >= set(METHODS)
    for file in files:
        attn = OmegaConf.to_container(OmegaConf.load(file).algorithm).get("attn", {})
        for node, values in attn.items():
            if node != "mix":
                default = dataclasses.asdict(METHODS[f"attn_{node}"]())
                assert [key for key, value in values.items() if value == default[key]] == [], file.name


@pytest.mark.parametrize("name", ["dual", "dual_released", "dapo"])
def test_vgpo_and_its_baseline_train_on_dapo_unless_another_is_named_after_it(repo, name):
    config = composed(repo, f"+method={name}")
    assert config.algorithm.adv_estimator == ("grpo" if name == "dapo" else "attn_dual")
    assert (config.algorithm.filter_groups.enable, config.actor_rollout_ref.actor.clip_ratio_high) == (True, 0.28)
    other = composed(repo, f"+method={name}", "+rl=grpo")
    assert other.algorithm.adv_estimator == config.algorithm.adv_estimator
    assert (other.algorithm.filter_groups.enable, other.actor_rollout_ref.actor.clip_ratio_high) == (False, 0.2)


def test_the_released_form_of_vgpo_is_that_of_its_class(repo):
    released = method_from_config(
        "attn_dual", OmegaConf.to_container(composed(repo, "+method=dual_released").algorithm.attn)
    )
    assert {key: vars(released)[key] for key in vars(DualConfig())} == vars(DualConfig.released())


def test_a_method_of_ones_own_is_composed_and_overridden_without_a_plus(repo):
    load_methods([str(repo / "recipe" / "example" / "reliance.py")])
    config = composed(repo, "+method=reliance", "algorithm.attn.reliance.weight=0.2")
    assert check_estimator(config) == METHODS["attn_reliance"](weight=0.2)
    with pytest.raises(SayoError, match=r"^SAYO-L02: unknown setting 'wieght' \(did you mean 'weight'\?\)"):
        check_estimator(composed(repo, "+method=reliance", "algorithm.attn.reliance.wieght=0.2"))


def test_settings_reach_the_method(make):
    config = make(**{"algorithm.attn.region": {"weight": 2, "layers": [-1, 0], "coverage": 1, "entropy_fraction": 1}})
    assert check_estimator(config) == RegionMethod(weight=2.0, layers=(-1, 0), coverage=1.0, entropy_fraction=1.0)
    assert "probing layer index 3, 0 of 4 layers, counted from 0" in dict(preflight(config))["model"]


@pytest.mark.parametrize("name", ["attn_regoin", "atn_region", "attention_region", "attn-region"])
def test_a_misspelt_estimator_suggests_ours(make, name):
    error = refused(make(**{"algorithm.adv_estimator": name}), "L01")
    assert error.where == "algorithm.adv_estimator"
    assert "did you mean 'attn_region'?" in str(error)
    assert "grpo" in str(error)


def test_a_misspelt_estimator_of_verl_suggests_verls(make):
    assert "did you mean 'grpo'?" in str(refused(make(**{"algorithm.adv_estimator": "grp"}), "L01"))


def test_an_unknown_key_suggests_the_right_one(repo):
    error = refused(composed(repo, "+hardware=cpu", "algorithm.attn.region.wieght=0.5"), "L02")
    assert error.where == "algorithm.attn.region"
    assert "'wieght' (did you mean 'weight'?)" in str(error)


def test_an_unknown_node_suggests_the_right_one(repo):
    error = refused(composed(repo, "+hardware=cpu", "algorithm.attn.regoin.weight=0.5"), "L02")
    assert error.where == "algorithm.attn"
    assert "'regoin' (did you mean 'region'?)" in str(error)


@pytest.mark.parametrize("estimator", ["grpo", "attn_dual"])
def test_an_unknown_key_of_a_method_that_does_not_run_is_refused_too(make, estimator):
    for key in ("regoin.weight", "region.wieght"):
        refused(make(**{"algorithm.adv_estimator": estimator, f"algorithm.attn.{key}": 0.5}), "L02")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", "1.0"),
        ("weight", True),
        ("weight", None),
        ("weight", [1.0]),
        ("entropy_fraction", "30%"),
        ("coverage", False),
        ("layers", -1),
        ("layers", "last"),
        ("layers", ["-1"]),
        ("layers", [1.5]),
        ("layers", [True]),
        ("layers", None),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(make, key, value):
    error = refused(make(**{f"algorithm.attn.region.{key}": value}), "L03")
    assert error.where == f"algorithm.attn.region.{key}"
    assert repr(value) in str(error)


@pytest.mark.parametrize("value", [0.5, None, "on", [1]])
def test_a_node_that_is_not_a_group_of_settings_is_refused(value):
    with pytest.raises(SayoError, match="SAYO-L03") as caught:
        method_from_config("attn_region", {"region": value})
    assert caught.value.where == "algorithm.attn.region"
    assert MESSAGE.fullmatch(str(caught.value))


def test_a_value_out_of_range_is_refused(make):
    error = refused(make(**{"algorithm.attn.region.entropy_fraction": 30}), "A05")
    assert error.where == "algorithm.attn.region.entropy_fraction"


def test_no_settings_are_the_defaults_and_whole_numbers_are_numbers():
    assert method_from_config("attn_region", {}) == RegionMethod()
    assert method_from_config("attn_region", {"region": {"weight": 1}}) == RegionMethod()
    assert isinstance(method_from_config("attn_region", {"region": {"weight": 1}}).weight, float)
    assert method_from_config("grpo", {"region": {"weight": 0.5}}) is None


def test_a_method_whose_package_is_missing_is_refused(make, monkeypatch):
    needs = RegionMethod().needs()
    packages = (("no_such_package", "pip install 'sayo-verl[anchor]'"),)
    monkeypatch.setattr(RegionMethod, "needs", lambda self: dataclasses.replace(needs, packages=packages))
    assert "pip install" in refused(make(), "L28").fix


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("absent.py", "absent.py"),
        ("broken.py", "invalid syntax"),
        ("wrong.py", "wrong.py: ZeroDivisionError: division by zero at "),
        ("no.such.module", "No module"),
    ],
)
def test_a_users_module_that_cannot_be_loaded_is_refused(tmp_path, file, says):
    (tmp_path / "broken.py").write_text("def :")
    (tmp_path / "wrong.py").write_text("x = 1 / 0")
    with pytest.raises(SayoError, match=r"^SAYO-L29: ") as caught:
        load_methods([str(tmp_path / file) if file.endswith(".py") else file])
    assert says in str(caught.value)


def test_a_method_of_ones_own_is_known_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("sayo_verl.methods.METHODS", METHODS.copy())
    monkeypatch.setattr("sayo_verl.launch.settings.METHODS", sayo_verl.methods.METHODS)
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from sayo_verl.methods import RegionMethod, register_method\n"
        "@register_method\n"
        "@dataclass(frozen=True)\n"
        "class Mine(RegionMethod):\n"
        "    weight: float = 0.25\n"
        "    name = 'attn_mine'\n"
    )
    assert load_methods([str(tmp_path / "mine.py")]) == [str(tmp_path / "mine.py")]
    method = method_from_config("attn_mine", {"mine": {"coverage": 1.0}})
    assert method is not None
    assert (method.name, vars(method)["weight"], vars(method)["coverage"]) == ("attn_mine", 0.25, 1.0)
    assert load_methods([str(tmp_path / "mine.py")])  # a second time does nothing
    assert "attn_mine" in sayo_verl.methods.own_methods()
    assert "attn_region" not in sayo_verl.methods.own_methods()


@pytest.mark.parametrize("name", ["attn_region", "attn_mix", "attn_spread_floor", "mine", None])
def test_a_class_that_cannot_be_a_method_is_refused(name):
    cls = dataclasses.make_dataclass("Mine", [], frozen=True, namespace={"name": name})
    with pytest.raises(SayoError, match=r"^SAYO-A14: "):
        register_method(cls)
    with pytest.raises(SayoError, match=r"^SAYO-A14: "):
        register_method(dataclasses.make_dataclass("Mine", [], namespace={"name": "attn_mine"}))


@pytest.mark.parametrize(
    ("estimator", "attn", "code"),
    [
        ("attn_mix", {}, "A12"),
        ("attn_mix", {"mix": ["region", "region"]}, "A12"),
        ("attn_mix", {"mix": ["regoin"]}, "L02"),
        ("attn_mix", {"mix": "region"}, "L03"),
        ("attn_region", {"mix": ["region"]}, "A12"),
        ("grpo", {"mix": ["region"]}, "A12"),
        ("attn_region", {"spread_floor": -1}, "L03"),
        ("attn_region", {"spread_floor": True}, "L03"),
        ("attn_region", {"spread_floor": 1.0}, "L03"),
    ],
)
def test_a_mix_or_floor_that_makes_no_sense_is_refused(estimator, attn, code):
    with pytest.raises(SayoError, match=f"^SAYO-{code}: "):
        settings_from_config(estimator, attn)


def test_a_mix_of_one_is_that_method():
    settings = settings_from_config("attn_mix", {"mix": ["region"], "region": {"weight": 2}, "spread_floor": None})
    assert settings.spread_floor is None
    assert isinstance(settings.method, Mix)
    assert settings.method.methods == (RegionMethod(weight=2.0),)
    assert settings.method.needs() == RegionMethod(weight=2.0).needs()


UNUSED = [
    ("grpo", {}, ("algorithm.attn.region.weight",), "region.weight"),
    ("attn_dual", {}, ("algorithm.attn.region.weight",), "region.weight"),
    ("rloo", {}, ("algorithm.attn.spread_floor",), "spread_floor"),
    ("attn_mix", {"mix": ["region", "dual"]}, ("algorithm.attn.anchor.neighbours",), "anchor.neighbours"),
]


@pytest.mark.parametrize(("estimator", "attn", "given", "key"), UNUSED)
def test_a_setting_of_a_method_that_does_not_run_is_refused(estimator, attn, given, key):
    with pytest.raises(
        SayoError, match=rf"^SAYO-L71: .* at algorithm.attn.{key} .* got .*={estimator}, wanted .*attn_"
    ):
        unused_settings(estimator, attn, given)


def test_settings_of_the_methods_that_run_are_used():
    given = ("algorithm.attn.region.weight", "algorithm.attn.mix")
    assert unused_settings("attn_region", {"region": {"weight": 0.5}}, given) == []
    mixed = {"mix": ["region", "dual"], "dual": {"beta": 0.1}}
    assert unused_settings("attn_mix", mixed, ("algorithm.attn.region.weight",)) == []
    default = {"region": {"weight": 1}}
    assert unused_settings("attn_dual", default, ("algorithm.attn.spread_floor", "data.seed")) == []
    assert unused_settings("grpo", {}) == []


def test_a_file_of_settings_may_serve_other_methods_and_the_plan_lists_what_is_not_used(make):
    assert unused_settings("grpo", {"region": {"layers": [1], "weight": 1.0}}) == ["region.layers=(1,)"]
    plan = dict(preflight(make(**{"algorithm.adv_estimator": "grpo", "algorithm.attn.region.weight": 0.5})))
    assert plan["not used"] == "region.weight=0.5"


def test_the_launcher_passes_on_the_keys_of_the_command_line(make):
    config = make(**{"algorithm.adv_estimator": "attn_dual"})
    with pytest.raises(SayoError, match="L71"):
        preflight(config, given=["algorithm.attn.region.weight"])
