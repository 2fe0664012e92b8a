"""The code, the commands and the tables of the documentation are true."""

import builtins
import contextlib
import json
import re
import shlex
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from sayo_verl.cli import build_parser
from sayo_verl.focus.job import read_job
from sayo_verl.probe.statistics import CATALOGUE

ROOT = Path(__file__).parent.parent
PROBE = (ROOT / "docs" / "probe.md").read_text()
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "recipe/**/*.md", "configs/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


# --------------------------------------------------------------------------------------------------------------- links


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def test_links_lead_to_files_and_headings():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())]
    local = [(page, *link.partition("#")[::2]) for page, link in links if "://" not in link]
    assert len(local) > 50
    for page, file, anchor in local:
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), f"{page}: {file}"
        assert not anchor or anchor in headings(target), f"{page}: {file}#{anchor}"


# ------------------------------------------------------------------------------------------------------------ commands
COMMANDS = [
    pytest.param(line, id=f"{page}: {line[:60]}")
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
NOT_RUN = ("pip", "source")  # they would install packages or enter an environment


@cache
def known_keys() -> Any:
    with initialize_config_dir(str(ROOT / "sayo_verl" / "config"), version_base=None):
        return compose("sayo_trainer")


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_docs_names_what_exists(line):
    for command in re.split(r"&&", line.partition(" #")[0]):
        words = shlex.split(command)
        variables = [word.partition("=")[0] for word in words if re.match(r"[A-Z_0-9]+=", word)]
        program, *arguments = words[len(variables) :]
        if program in NOT_RUN:
            continue
        if program == "sayo":
            parsed = build_parser().parse_args(arguments)
            if arguments[:2] == ["focus", "run"]:
                read_job(ROOT / parsed.job, parsed.settings)
            continue
        assert program in ("bash", "python", "python3", "torchrun"), program
        if program == "bash":
            script = ROOT / arguments[0]
            assert script.is_file()
            texts = "".join(path.read_text() for path in (ROOT / "scripts").glob("*.sh"))
            assert not [name for name in variables if not re.search(rf"\b{name}\b", texts)]
            if "anchor" in script.name:
                read_job(ROOT / "configs" / "focus" / "qwen2_5vl_7b.yaml", arguments[1:])
            else:
                check_overrides(arguments[1:])
        elif arguments[0] == "-m":
            module = ROOT / arguments[1].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        else:
            assert (ROOT / arguments[0]).is_file()


def check_overrides(words: list[str]) -> None:
    for word in words:
        if "=" in word and not word.startswith("+"):
            key = word.partition("=")[0]
            missing = object()
            assert OmegaConf.select(known_keys(), key, default=missing) is not missing, f"no key {key}"


# --------------------------------------------------------------------------------------------------------------- python
def rows_file(tmp_path: Path) -> dict[str, Any]:
    row = SimpleNamespace(file_name="a.png", question="?", answer="red", x=1, y=2, w=3, h=4)
    (tmp_path / "mine").mkdir()
    return {"my_rows": [row]}


def signals(_: Path) -> dict[str, Any]:
    score = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    return {"score": score, "response_mask": torch.ones(2, 3), "uid": ("a", "a")}


PREPARED = {  # what a page's own example needs
    "README.md": lambda _: {"png": b""},
    "docs/data.md": rows_file,
    "recipe/vgpo/README.md": signals,
}
ELSEWHERE = {"docs/probe.md": "below", "docs/add_a_method.md": "methods/test_example_method.py"}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=str)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    if str(page) in ELSEWHERE:
        return
    names = PREPARED.get(str(page), lambda _: {})(tmp_path)
    monkeypatch.chdir(tmp_path)
    for code in blocks(page, "python"):
        named = re.search(r"# (\w+Error): .*$", code.rstrip().splitlines()[-1])  # a reproduction that ends in an error
        with pytest.raises(getattr(builtins, named[1])) if named else contextlib.nullcontext():
            exec(code, names)  # noqa: S102 (the page's own example)
    if str(page) == "docs/data.md":
        assert json.loads((tmp_path / "mine" / "questions.jsonl").read_text())["boxes"] == [[1, 2, 4, 6]]


# --------------------------------------------------------------------------------------------------- docs/probe.md
def test_probe_md_lists_every_statistic():
    table = PROBE.split("## How it reads")[0]
    told = set(re.findall(r"`([a-z_]+)`", "".join(line for line in table.splitlines() if line.startswith("| `"))))
    assert told - {"per_head", "query_row"} == set(CATALOGUE)


def test_probe_md_reads_a_plain_hugging_face_model(random_policy):
    model = AutoModelForImageTextToText.from_pretrained(random_policy, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(random_policy)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8))
    image_part = "<|vision_start|><|image_pad|><|vision_end|>"
    text = f"<|im_start|>user\n{image_part}where ?<|im_end|>\n<|im_start|>assistant\nhere ."
    inputs = dict(processor(text=[text], images=[image], return_tensors="pt"))
    names = {"model": model, "inputs": inputs, "input_ids": inputs["input_ids"], "response_length": 3}
    code = next(block for block in re.findall(r"```python\n(.*?)```", PROBE, re.S) if "ForwardTap" in block)
    exec(code, names)  # noqa: S102 (the page's own example)
    assert names["values"].shape == (12,)
    assert names["lengths"] == [12]
    mass, lengths = names["measurement"].finish()["image_mass.input.L-1"]
    assert lengths == [3]
    assert float(names["values"].sum()) == pytest.approx(float(mass.sum()), abs=1e-5)


@pytest.mark.parametrize(("recipe", "method"), [("sayo", "region"), ("vgpo", "dual"), ("evidence", "evidence")])
def test_the_formulas_of_a_recipe_are_those_of_its_method(recipe, method):
    page = (ROOT / "recipe" / recipe / "README.md").read_text().partition("## The method")[2].partition("## ")[0]
    formulas = re.search(r"(?:^    .*\n)+", page, re.M)
    assert formulas is not None
    assert len(formulas[0].splitlines()) >= 6
    assert formulas[0] in (ROOT / "sayo_verl" / "methods" / f"{method}.py").read_text()
