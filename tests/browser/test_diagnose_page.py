"""The page of ``sayo diagnose`` in a browser."""

from pathlib import Path

from support.browser import check_page
from support.diagnosed import answers

from sayo_verl.diagnose.page import write_files
from sayo_verl.diagnose.run import analyse, headline


def test_the_page_of_two_models_opens(tmp_path: Path):
    sets = {"new": answers(6), "old": answers(6, seed=1)}
    found = analyse(sets)
    check_page(write_files(tmp_path, "new against old", ["What was run."], headline(sets, found), found, [], {}))
