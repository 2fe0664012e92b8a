"""The page of `sayo look`."""

import re

from support.viewed import EVIL, looked_at, said

from sayo_verl.look.page import write_page


def test_each_prompt_has_a_viewer_and_a_link(tmp_path):
    prompts = [looked_at(), looked_at(text=EVIL)]
    write_page(tmp_path / "new" / "look.html", "Where it looked", [(p, said(p)) for p in prompts], {"model": EVIL})
    source = (tmp_path / "new" / "look.html").read_text()
    assert re.findall(r'<a href="#(\w+)">', source) == ["item0", "item1"]
    assert source.count('<section class="viewer"') == 2
    assert EVIL not in source
