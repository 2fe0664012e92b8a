"""Large JSON: the values of any file, and one line for every fault."""

import gzip
import json
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import refusal

from sayo_verl.data import json_files
from sayo_verl.data.json_files import json_items, json_lines, json_records
from sayo_verl.errors import SayoError

OBJECT = {"a": 1, "b": {"c": [1.5, 2, None]}, "ü": "三"}
ARRAY = {"info": {"images": 3}, "images": [{"id": 1}, {"id": 2}], "rest": []}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FEW = settings(max_examples=60, deadline=None)


def written(folder: Path, value, name: str = "file.json") -> Path:
    path = folder / name
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode())
    return path


def packed(path: Path) -> list[Path]:
    """The file plain, as .gz and as the only JSON in a .zip."""
    (path.parent / "p.gz").write_bytes(gzip.compress(path.read_bytes()))
    with zipfile.ZipFile(path.parent / "p.zip", "w") as archive:
        archive.writestr("__MACOSX/x.json", "")
        archive.writestr("licence.txt", "mine")
        archive.write(path, "sub/" + path.name)
    return [path, path.parent / "p.gz", path.parent / "p.zip"]


def test_entries_elements_and_lines_come_in_order_from_plain_and_packed_files(tmp_path):
    for path in packed(written(tmp_path, OBJECT)):
        assert list(json_items(path)) == list(OBJECT.items())
    for path in packed(written(tmp_path, ARRAY)):
        assert list(json_items(path, "images.item")) == [(0, {"id": 1}), (1, {"id": 2})]
        assert list(json_items(path, "categories.item")) == []
    for path in packed(written(tmp_path, b'{"a": 1}\n\n  \r\n[2]', "lines.jsonl")):
        assert list(json_lines(path)) == list(json_records(path)) == [(1, {"a": 1}), (4, [2])]
    assert list(json_records(written(tmp_path, b" \n[1, {}]"))) == [(1, 1), (2, {})]


def test_a_byte_order_mark_of_utf_8_is_skipped(tmp_path):
    for path in packed(written(tmp_path, b"\xef\xbb\xbf" + json.dumps(OBJECT).encode())):
        assert dict(json_items(path)) == OBJECT
        assert dict(json_lines(path)) == {1: OBJECT}


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le", "latin-1"])
def test_another_encoding_is_named_and_not_called_cut_short(tmp_path, encoding):
    text = '{"question": "三辆公交车?", "answer": "2"}' if encoding != "latin-1" else '{"question": "Café?"}'
    path = written(tmp_path, text.encode(encoding))
    for read in (json_items, json_lines, json_records):
        with refusal("D47", "not UTF-8.*iconv") as caught:
            list(read(path))
        assert "cut short" not in str(caught.value)


def test_broken_json_stops_with_its_place(tmp_path):
    faults = {b'{"a": 1, "b": {"c": [': "not JSON.*after record 'a'", b'{"a": 1} {"b": 2}': "not JSON"}
    faults |= {b'{"a": NaN}': "not JSON", b"[1, 2]": "another kind", b"": "another kind"}
    for text, says in faults.items():
        with refusal("D47", says) as caught:
            list(json_items(written(tmp_path, text)))
        assert str(tmp_path) in caught.value.where
    with refusal("D47", "line 3") as caught:
        list(json_lines(written(tmp_path, b'{"a": 1}\n{}\n{"a": \n{}\n')))
    assert caught.value.where.endswith("line 3")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    damaged = written(tmp_path, gzip.compress(json.dumps(list(range(999))).encode())[:-9], "cut.gz")
    several = tmp_path / "several.zip"
    with zipfile.ZipFile(several, "w") as archive:
        archive.writestr("a.json", "{}")
        archive.writestr("b.json", "{}")
    for path, says in [(tmp_path / "none.json", "No such file"), (damaged, "ended"), (tmp_path, "directory")]:
        with refusal("D48", says):
            list(json_items(path, "item"))
    with refusal("D48", "a.json, b.json"):
        list(json_items(several))
    with refusal("D48"):
        list(json_items(written(tmp_path, b"PK\3\4 no archive")))


@FEW
@given(st.dictionaries(st.text(), JSON, max_size=5), st.booleans())
def test_any_object_is_read_as_json_reads_it(tmp_path_factory, value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    path = written(tmp_path_factory.mktemp("any"), text)
    assert dict(json_items(path)) == value
    assert [v for _, v in json_lines(path)] == [value]


@FEW
@given(st.lists(JSON, min_size=1, max_size=5), st.floats(0, 1, exclude_max=True))
def test_any_cut_is_a_refusal(tmp_path_factory, value, share):
    text = json.dumps(value).encode()
    path = written(tmp_path_factory.mktemp("cut"), text[: int(share * len(text))])
    with pytest.raises(SayoError, match="D47"):
        list(json_items(path, "item"))


def test_memory_stays_flat_in_the_number_of_records(tmp_path):
    peaks = []
    for n in (2_000, 20_000):
        path = written(tmp_path, {"images": [{"id": i, "name": f"{i}" * 20} for i in range(n)]})
        tracemalloc.start()
        assert sum(1 for _ in json_items(path, "images.item")) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000


def test_deep_brackets_half_surrogates_and_an_array_for_lines_are_one_error(tmp_path):
    deep = b'{"a": ' + b"[" * 100_000
    for read, text, says in [
        (json_lines, deep, "recursion"),
        (json_lines, rb'{"a": "\ud83d"}', "surrogate"),
        (json_lines, b"[{}]", "one JSON object on each line"),
    ]:
        with refusal("D47", says):
            list(read(written(tmp_path, text)))


def test_a_line_without_an_end_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_LINE", 1000)
    assert list(json_lines(written(tmp_path, b'{"a": 1}\n' + b" " * 900 + b"\n2"))) == [(1, {"a": 1}), (3, 2)]
    with refusal("D47", "too long") as caught:
        list(json_lines(written(tmp_path, b'{"a": 1}\n"' + b"x" * 2000)))
    assert caught.value.where.endswith("line 2")


def test_a_packed_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_UNPACKED", 1000)
    plain = written(tmp_path, b'{"a": "' + b"x" * 2_000_000 + b'"}\n')
    assert len(list(json_lines(plain))) == 1  # it takes the room that the file has
    (tmp_path / "p.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(plain, "a.json")
    for path in (tmp_path / "p.gz", tmp_path / "p.zip"):
        for read in (json_items, json_lines):
            with refusal("D48", "unpacks to more than"):
                list(read(path))


@pytest.mark.parametrize("level", [b"[", b'{"a":'])
def test_a_value_of_a_hundred_thousand_levels_is_refused(tmp_path, level):
    deep = level * 100_000
    with refusal("D47", "nested more than"):
        list(json_items(written(tmp_path, b'{"a":' + deep)))
    with refusal("D47", "not JSON"):
        list(json_lines(written(tmp_path, b'{"a":' + deep)))
