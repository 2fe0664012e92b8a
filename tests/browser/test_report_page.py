"""The page of a run and that of a comparison, in a browser."""

from pathlib import Path

import pytest
from support.browser import check_page
from support.report_runs import ATTENTION, GRPO, line, make_run, recorded, write_run

from sayo_verl.report.compare import compare
from sayo_verl.report.compare_page import comparison_page
from sayo_verl.report.page import write_page
from sayo_verl.report.runs import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, ATTENTION)
    long = "a_name_without_any_space_" * 8
    recorded(folder, pieces=("<b>", f" {long}", " $x$", " ring", " c", " d"))
    return folder


def test_the_page_of_a_run_works_in_a_browser(run):
    def act(page) -> None:
        assert page.locator("section.viewer").count() == 2
        viewer = page.locator("section.viewer").first
        slider = viewer.locator("input[aria-label=state]")
        assert viewer.get_by_text("step 10").first.is_visible()
        slider.focus()
        page.keyboard.press("ArrowLeft")
        assert viewer.get_by_text("step 0").first.is_visible()
        page.locator("summary").first.click()

    check_page(write_page(load_run(run)), act)


def test_the_page_of_a_short_run_without_rollouts_works_in_a_browser(tmp_path):
    check_page(write_page(load_run(write_run(tmp_path, line(1, **GRPO)))))


def test_the_page_of_a_comparison_works_in_a_browser(run, tmp_path):
    other = tmp_path / "grpo"
    make_run(other, GRPO, estimator="grpo")
    recorded(other)
    page = tmp_path / "compare.html"
    page.write_text(comparison_page(compare([run, other])))

    def act(page) -> None:
        assert page.locator("section.viewer").count() == 2
        slider = page.locator("section.viewer input[aria-label=state]").first
        before = page.locator("section.viewer").first.inner_text()
        slider.focus()
        page.keyboard.press("ArrowLeft")
        assert page.locator("section.viewer").first.inner_text() != before

    check_page(page, act)
