"""The cost benchmark: its self-check runs and writes a whole page, its arithmetic and its verdicts are right.

Nothing here asserts a time.
"""

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(repo: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo / "benchmarks" / "probe_cost.py"), *map(str, arguments)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(repo)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.fixture(scope="module")
def self_check(repo, tmp_path_factory):
    """The page and the raw numbers of one run."""
    folder = tmp_path_factory.mktemp("benchmark")
    done = run(repo, "--quick", "--out", folder / "page.md", "--raw", folder / "cpu.json")
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "page.md").read_text(), json.loads((folder / "cpu.json").read_text())


def test_the_self_check_of_preparing_measures_every_case(repo, tmp_path):
    raw = tmp_path / "prepare.json"
    command = [sys.executable, str(repo / "benchmarks" / "prepare_speed.py"), "--quick", "--raw", str(raw)]
    env = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(raw.read_text())["cases"]
    assert [(case["rows"], case["cores"]) for case in cases] == [(16, 1), (48, 1), (16, 2), (48, 2)]
    assert all(case["peak_anonymous_mb"] > 10 and case["rows_per_cpu_s"] > 0 for case in cases)


@pytest.fixture(autouse=True)
def parts(repo, monkeypatch):
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))


def tables(page: str) -> list[list[list[str]]]:
    """Cells of every table, row by row, without the rule under the header."""
    blocks = re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    rows = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()] for block in blocks]
    return [[table[0], *table[2:]] for table in rows]


def row(page: str, title: str) -> list[str]:
    found = [cells for table in tables(page) for cells in table if cells[0] == title]
    assert len(found) == 1, (title, found)
    return found[0]


def test_the_self_check_measures_every_variant_of_every_part(self_check):
    _, raw = self_check
    assert raw.get("failures", {}) == {}
    assert {case["part"]: case["paths"] for case in raw["cases"].values()} == {
        "cpu": ["reference"],
        "card": ["fast", "reference"],
    }
    assert {case["shape"]["family"] for case in raw["cases"].values()} == {"qwen3_vl", "qwen2_5_vl"}
    for case in raw["cases"].values():
        assert set(case["memory"]) == set(case["times"])
        for name, times in case["times"].items():
            assert times["seconds"], name
            assert all(0 < x < math.inf for x in times["seconds"]), name
        # CPU time in float32, so eager attention and the probe must agree to rounding
        assert max(case["agreement"].values()) < 1e-5
    assert {series["part"] for series in raw["scaling"].values()} == {"cpu", "card"}


def test_the_page_of_the_self_check_is_whole_and_says_what_it_is(self_check):
    page, _ = self_check
    assert "SELF-CHECK" in page
    found = tables(page)
    assert len(found) >= 10
    for table in found:
        assert all(len(cells) == len(table[0]) for cells in table), table
    after_targets = page.split("## On a GPU")[1]
    assert "not measured" not in after_targets.replace("floor not measured", "")
    assert not re.search(r"\bnan\b|\binf\b|\{|\}", page)
    assert row(page, "one layer")[-1] == "not measured", "a self-check must not pass for the real model"


def test_without_numbers_the_page_says_so_and_still_has_target_and_arithmetic(repo, tmp_path):
    done = run(repo, "--page-only", "--device", "cpu", "--out", tmp_path / "page.md", "--raw", tmp_path / "cpu.json")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert "SELF-CHECK" not in page
    assert row(page, "one layer")[1:] == ["at most 0.1 %", "0.030 to 0.146 %", "0.045 to 0.189 %", "not measured"]
    assert row(page, "all 36 layers")[1:] == ["at most 3 %", "1.1 to 5.2 %", "1.6 to 6.8 %", "not measured"]
    on_gpu = page.split("## On a GPU")[1].split("## On a CPU")[0]
    assert on_gpu.strip().startswith("Not run, because there was no card.")
    assert not tables(on_gpu), "an empty table says less than a line"


def test_a_gpu_that_is_not_there_is_refused_at_once(repo, tmp_path):
    done = run(repo, "--device", "cuda", "--out", tmp_path / "page.md", "--raw", tmp_path / "cuda.json")
    assert done.returncode == 2
    assert "torch finds no GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_arithmetic_against_counting():
    from cost.shapes import REAL, Lengths, masses_operations, pass_operations, qwen3_vision_operations

    lengths = Lengths(3, (2, 2), 1, 5)
    assert (lengths.prompt, lengths.total) == (8, 13)
    assert lengths.pairs == sum(8 + i + 1 for i in range(5))
    shape, real = REAL[0], Lengths(64, (32, 32), 64, 2048)
    # layer by layer, operation by operation: q, k, v, o, three of the MLP, causal attention, lm_head
    per_token = 2 * sum(
        a * b for a, b in [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *[(4096, 12288)] * 3]
    )
    attention = 36 * 2 * 2 * 32 * 128 * sum(range(1, real.total + 1))
    assert pass_operations(shape, real) == 36 * real.total * per_token + attention + 2 * real.total * 4096 * 151936
    assert masses_operations(shape, real) == 2 * 32 * 128 * real.pairs
    assert qwen3_vision_operations(4096, 1024) / 1e12 == pytest.approx(5.8, abs=0.05)


def test_the_forecast_against_counting():
    from cost.forecast import BYTES, EXPONENTIALS, PRODUCTS, forecast, in_turn_limit, work
    from cost.shapes import REAL, Lengths

    shape, n = REAL[0], Lengths(64, (64, 64), 64, 2048)
    seen = [sum(range(n.prompt + 1, n.total + 1)), n.response * 4096]  # causal keys; those of the image
    for lse_given, pairs in zip((False, True), seen, strict=True):
        layer = work(shape, n, lse_given)
        assert layer.exponentials == 32 * pairs
        assert layer.operations == 2 * 128 * 32 * pairs
        keys = 4096 if lse_given else n.total
        assert layer.moved == 2 * 128 * (32 * 2048 + 8 * keys) + 4 * 3 * 32 * 2048
        products, exponentials, moved = layer.floors
        assert products == pytest.approx(layer.operations / PRODUCTS)
        assert exponentials == pytest.approx(32 * pairs / EXPONENTIALS)
        assert moved == pytest.approx(layer.moved / BYTES)
        assert layer.overlapped == products
        assert layer.in_turn == products + exponentials
    assert in_turn_limit() / 1e12 == pytest.approx(1 / (1 / 800 + 1 / (256 * EXPONENTIALS / 1e12)), rel=1e-6)
    low, high = forecast(n, 1, lse_given=False, vision=True)
    assert (low, high) == pytest.approx((0.114, 0.130), abs=5e-4)
    low, high = forecast(n, 36, lse_given=False, vision=True)
    assert (low, high) == pytest.approx((4.1, 4.7), abs=0.05)


def test_the_page_shows_figures_of_a_card_and_none_of_a_rehearsal(self_check, tmp_path):
    from cost.page import write_page

    _, raw = self_check
    case = copy.deepcopy(next(c for c in raw["cases"].values() if c["part"] == "card"))
    case["shape"] |= {"name": "Qwen3-VL-8B", "layers": 5}
    case["times"].pop("profile reference")  # a brief case leaves variants out
    figures = {
        "a": {
            "stage": "focus",
            "what": "a step",
            "value": "1.2 s",
            "card": "H100",
            "stood_in": {"weights": "random", "tokenizer": "a small one"},
        },
        "b": {"stage": "kernels", "what": "masses", "value": "rehearsed", "stood_in": {"tiny": "a CPU"}, "card": "CPU"},
    }
    raw = {"cases": {"one": case}, "scaling": {}, "failures": {}, "figures": figures}
    write_page(tmp_path / "page.md", raw)
    page = (tmp_path / "page.md").read_text()
    assert row(page, "focus") == ["focus", "a step", "1.2 s"]
    assert "\n- focus: tokenizer: a small one\n" in page
    assert "rehearsed" not in page
    on_gpu = page.split("## On a GPU")[1].split("## On a CPU")[0]
    assert "profile kernel of the reference path" not in on_gpu
    assert "out of memory" not in on_gpu, "what was left out did not run out of memory"
    assert "### Qwen2.5-VL-7B" not in page
    assert "Qwen2.5-VL-7B: not run.\n" in on_gpu


def test_verdicts_exponents_and_failures_come_from_the_numbers(self_check, tmp_path):
    from cost.cells import exponent
    from cost.page import write_page

    _, raw = self_check
    case = copy.deepcopy(next(c for c in raw["cases"].values() if c["part"] == "card"))
    case["shape"] |= {"name": "Qwen3-VL-8B", "layers": 36}
    case["times"] = {
        "pass": {"seconds": [2.0, 4.0, 3.0]},
        "alone fast": {"seconds": [0.01, 0.02, 0.015]},
        "probe fast 36": {"seconds": [2.1, 4.2, 3.15]},  # 5 % more
        "eager 1": {"failed": "CUDA out of memory"},
        **{
            f"{part} {path}": {"seconds": [1.0]}
            for part in ("plan", "read", "masses", "profile")
            for path in case["paths"]
        },
        "read fast": {"seconds": [0.001, 0.002, 0.0015]},  # 0.05 % in every round
        "alone reference": {"seconds": [0.02, 0.04, 0.03]},
    }
    rows = {
        str(n): {
            "tokens": n,
            "pairs": n * n,
            "times": {"fast": {"seconds": [3e-9 * n * n]}, "eager": {"failed": "no"}},
            "memory": {"fast": 7 * n, "eager": None},
        }
        for n in (10, 20, 40)
    }
    series = {"part": "card", "rates": {"matmul_operations": 1e12, "copy_bytes": 1e12}, "rows": rows}
    assert exponent(series, "fast", "time") == pytest.approx(1)
    assert exponent(series, "fast", "memory") == pytest.approx(1)
    assert exponent(series, "eager", "time") is None
    failures = {"card:both Qwen2.5-VL-7B": {"date": "2026-01-01", "error": "RuntimeError: no such rotary function"}}
    write_page(
        tmp_path / "page.md", {"cases": {"one": case}, "scaling": {"card: Qwen3-VL-8B": series}, "failures": failures}
    )
    page = (tmp_path / "page.md").read_text()
    assert row(page, "one layer")[-1] == "0.050 to 0.050 %: met"
    assert row(page, "all 36 layers")[-1] == "5.000 to 5.000 %: missed"
    assert row(page, "memory")[-1] == "exponent 1.00 over tokens"
    assert row(page, "eager attention in 1 layer / pass")[-1] == "out of memory"
    assert "The last run failed (2026-01-01): `RuntimeError: no such rotary function`" in page.split("Qwen2.5-VL-7B")[1]
