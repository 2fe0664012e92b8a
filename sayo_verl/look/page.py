"""The page of `sayo look`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sayo_verl.view.page import page, text
from sayo_verl.view.seen import SeenPrompt, SeenResponse
from sayo_verl.view.viewer import BUDGET, mount


def write_page(
    path: Path | str, title: str, items: Sequence[tuple[SeenPrompt, SeenResponse]], about: Mapping[str, str]
) -> None:
    """Write one HTML file with a viewer for each prompt and its response.

    Args:
        path: of the file.
        title: heading.
        items: in the order of the page. They share the budget of bytes.
        about: name -> text of the table under the heading, such as the model.
    """
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in about.items())
    known = f'<dl class="facts">{rows}</dl>'
    links = [f'<li><a href="#item{i}">{text(prompt.where)}</a></li>' for i, (prompt, _) in enumerate(items)]
    contents = f'<nav aria-label="prompts"><ol class="contents">{"".join(links)}</ol></nav>' if len(items) > 1 else ""
    body = f"<h1>{text(title)}</h1>\n<main>{known}{contents}"
    data: dict[str, Any] = {}
    for i, (prompt, response) in enumerate(items):
        html, islands = mount(f"item{i}", prompt, {"": [response]}, budget=BUDGET // len(items))
        body += html
        data |= islands
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page(title, f"{body}</main>", data=data, viewer=True), encoding="utf-8")
