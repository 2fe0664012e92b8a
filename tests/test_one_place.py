"""Defaults, metrics and names of the methods stand in one place, and what is made from them is up to date."""

import importlib.util
import re
from pathlib import Path

import pytest

from sayo_verl.methods import METHODS, RegionMethod

ROOT = Path(__file__).resolve().parent.parent
_SPEC = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(generate)
METHOD_FILES = {
    name: Path(__import__(cls.__module__, fromlist="_").__file__) for name, cls in generate.shipped().items()
}


@pytest.mark.parametrize("name", generate.FILES)
def test_what_is_made_from_the_code_is_up_to_date(name):
    assert (ROOT / name).read_text() == generate.FILES[name](), "run python docs/generate.py"


@pytest.mark.parametrize("name", METHOD_FILES)
def test_each_setting_says_what_it_means_and_where_its_default_comes_from(name):
    for key, default, wanted, meaning, source in generate.settings_rows(METHODS[name]()):
        assert all((default, wanted, meaning)), key
        assert source, f"{key} names no source, such as [P] or [ours]"


def sources() -> list[Path]:
    """The files that people write: no generated pages, no results, no environments."""
    made = {ROOT / name for name in generate.FILES}
    folders = ("benchmarks", "configs", "docs", "recipe", "sayo_verl", "scripts", "tests")
    found = [*ROOT.glob("*.md"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    return [file for file in found if file.suffix in (".yaml", ".sh", ".py", ".md") and file not in made]


def test_one_line_states_the_default_of_entropy_fraction():
    value = str(RegionMethod.entropy_fraction)
    states = re.compile(rf"entropy_fraction\W*(?:float\W*)?0?{re.escape(value.removeprefix('0'))}(?!\d)", re.IGNORECASE)
    for dialect in (f"ENTROPY_FRACTION:-{value}", f"`a.entropy_fraction` | {value}", f'"entropy_fraction": {value},'):
        assert states.search(dialect)
    found = {file: states.findall(file.read_text()) for file in sources()}
    assert {file: lines for file, lines in found.items() if lines} == {
        METHOD_FILES["attn_region"]: [f"entropy_fraction: float = {value}"]
    }


# Files of the package, other than a method's own and the registry, that name a method, and why.
NAMED_ELSEWHERE = {
    "attn_region": {
        "config/sayo_trainer.yaml": "the estimator of a run that names none",
        "errors.py": "an example of a message",
        "report/catalogue.py": "an example of a label",
        "launch/reward_check.py": "its paper rewards no accuracy, which the plan says",
        "tiny/evaluate.py": "measures the tokens that it selects",
        "diagnose/findings.py": "the share of tokens that it selects",
    },
    "attn_dual": {"diagnose/findings.py": "its score, late against early"},
    "attn_anchor": {
        "metis.py": "the graph partition of this method",
        "diagnose/findings.py": "its connectivity",
        "doctor/packages.py": "the one method that needs METIS",
    },
    "attn_faithful": {
        "diagnose/answers.py": "its changed image",
        "diagnose/findings.py": "its causal effect",
        "cli.py": "the help of that stage's command",
        "focus/__init__.py": "the first stage of this method",
        "launch/preflight.py": "the plan says whether that stage was run",
        "launch/template_check.py": "the plan says whether that stage was run",
    },
    "attn_evidence": {"launch/reward_check.py": "its reward takes the place of another one, of which it must know"},
}


@pytest.mark.parametrize("name", METHOD_FILES)
def test_a_builtin_method_is_its_file_a_line_of_the_registry_a_yaml_and_a_recipe(name):
    registry, package = ROOT / "sayo_verl" / "methods" / "__init__.py", ROOT / "sayo_verl"
    cls = METHODS[name].__name__
    mentions = re.compile(rf"\b({name}|{cls})\b")
    found = {file for file in sources() if package in file.parents and mentions.search(file.read_text())}
    others = {str(file.relative_to(package)) for file in found - {METHOD_FILES[name], registry}}
    assert others <= set(NAMED_ELSEWHERE.get(name, ())), "name it there with a reason, or leave the method out"
    assert (ROOT / "configs" / "method" / f"{name.removeprefix('attn_')}.yaml").is_file()
    assert [file for file in (ROOT / "recipe").glob("*/README.md") if f"(`{name}`)" in file.read_text()]
