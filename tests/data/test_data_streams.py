"""Streamed JSON: what is read, and everything that must stop the reader."""

import gzip
import json
import stat
import tracemalloc
import zipfile

import ijson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import refusal

from sayo_verl.data import streams
from sayo_verl.data.streams import json_array, json_items, json_lines, place_of
from sayo_verl.errors import SayoError


def _installed(name: str) -> bool:
    try:
        ijson.get_backend(name)
    except ImportError:
        return False
    return True


BACKENDS = [name for name in ijson.ALL_BACKENDS if _installed(name)]
DEEP = 10**5
RECORD = {"name": "mañ 人", "box": [1, 2.5, -3, 0], "no": None, "yes": True, "in": {"a": [{"b": "}{]["}], "e": {}}}


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def zipped(path, members, **attributes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, zipfile.ZIP_DEFLATED
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.writestr(info, data)
    return path


def test_the_parser_of_c_is_used_where_it_is_installed():
    assert set(BACKENDS) >= {"python"}
    assert ("yajl2_c" in BACKENDS) == (streams.BACKEND == "yajl2_c")


# --------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_come_in_order_with_plain_values(tmp_path, backend):
    data = {"b": RECORD, "a": [1, [2, []]], "c": "text", "d": 1.0, "": None, "e": {}, "f": []}
    path = write(tmp_path / "x.json", json.dumps(data))
    read = list(json_items(path, backend=backend))
    assert read == list(data.items())
    assert type(dict(read)["d"]) is float
    assert type(dict(read)["b"]["box"][0]) is int
    assert type(dict(read)["b"]["box"][1]) is float  # no Decimal


def test_plain_gz_and_zip_give_the_same(tmp_path):
    text = json.dumps({str(i): RECORD for i in range(50)})
    plain = write(tmp_path / "x.json", text)
    packed = write(tmp_path / "x.json.gz", gzip.compress(text.encode()))
    archive = zipped(tmp_path / "x.zip", {"folder/x.json": text, "readme.txt": "?", "__MACOSX/._x.json": "junk"})
    wrong_name = write(tmp_path / "y.json", packed.read_bytes())
    want = list(json_items(plain))
    assert len(want) == 50
    for path in (packed, archive, wrong_name, f"{archive}::folder/x.json", f"{archive}::x.json"):
        assert list(json_items(path)) == want, path
    assert list(json_items(archive, "x.json")) == want


def test_a_member_is_chosen_or_asked_for(tmp_path):
    archive = zipped(tmp_path / "x.zip", {"a/train.json": '{"a": 1}', "b/train.json": "{}", "val.json": '{"v": 2}'})
    assert list(json_items(f"{archive}::val.json")) == [("v", 2)]
    assert list(json_items(f"{archive}::a/train.json")) == [("a", 1)]
    for path, count in ((archive, 3), (f"{archive}::train.json", 2), (f"{archive}::test.json", 0)):
        with refusal("D48", "which member") as told:
            list(json_items(path))
        assert f"{count} members" in str(told.value)
        assert "a/train.json" in str(told.value)
    with refusal("D48", "no zip"):
        list(json_items(write(tmp_path / "p.json", "{}"), "p.json"))
    assert place_of("a.zip::b.json") == place_of("a.zip", "b.json")


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_are_found_by_prefix(tmp_path, backend):
    data = {"info": {"images": [9]}, "images": [{"id": i} for i in range(5)], "deep": {"er": [[1], 2]}, "none": []}
    path = write(tmp_path / "x.json", json.dumps(data))
    assert list(json_array(path, "images.item", backend=backend)) == data["images"]
    assert list(json_array(path, "deep.er.item", backend=backend)) == [[1], 2]
    assert list(json_array(path, "none.item", backend=backend)) == []
    assert list(json_array(write(tmp_path / "y.json", "[1, [2], {}]"), backend=backend)) == [1, [2], {}]
    assert list(json_array(write(tmp_path / "z.json", "[]"), backend=backend)) == []
    with refusal("D47", "no key 'annotations'") as told:
        list(json_array(path, "annotations.item", backend=backend))
    assert "images" in str(told.value)
    with refusal("D47", "another kind"):
        list(json_array(path, "info.item", backend=backend))


def test_lines_have_their_numbers(tmp_path):
    text = '{"a": 1}\r\n\n  \n[2.5]\n"\\u00e9 \\ud83d\\ude00"'
    want = [(1, {"a": 1}), (4, [2.5]), (5, "é 😀")]
    assert list(json_lines(write(tmp_path / "x.jsonl", text))) == want
    assert list(json_lines(write(tmp_path / "x.gz", gzip.compress(text.encode())))) == want
    assert list(json_lines(zipped(tmp_path / "x.zip", {"x.jsonl": text}))) == want
    assert list(json_lines(write(tmp_path / "none.jsonl", ""))) == []


@pytest.mark.parametrize("packed", [False, True])
def test_progress_is_of_the_whole_file(tmp_path, packed):
    text = json.dumps({str(i): {**RECORD, "i": [i * j % 977 for j in range(40)]} for i in range(3000)}).encode()
    path = write(tmp_path / "x", gzip.compress(text) if packed else text)
    calls: list[tuple[int, int]] = []
    assert sum(1 for _ in json_items(path, progress=lambda at, total: calls.append((at, total)))) == 3000
    assert {total for _, total in calls} == {path.stat().st_size}
    assert [at for at, _ in calls] == sorted(at for at, _ in calls)
    assert calls[-1][0] == path.stat().st_size
    assert 5 < len(calls) < 100  # by blocks, not by entries

    def broken(at, total):
        raise OSError("pipe")

    with pytest.raises(RuntimeError, match="progress callback"):
        list(json_items(path, progress=broken))


def test_memory_stays_flat(tmp_path):
    def peak(read) -> int:
        tracemalloc.start()
        count = sum(1 for _ in read)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count > 0
        return top

    peaks: dict[str, list[int]] = {"array": [], "lines": [], "passed over": []}
    for count in (1500, 6000):
        records = [RECORD] * count  # more than the block that is read at once
        both = write(tmp_path / "both.json", json.dumps({"big": records, "small": [1]}))
        lines = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, records)))
        peaks["array"].append(peak(json_array(both, "big.item")))
        peaks["lines"].append(peak(json_lines(lines)))
        peaks["passed over"].append(peak(json_array(both, "small.item")))
    for name, (small, large) in peaks.items():
        assert large < 1.25 * small + 20_000, name
    keys = write(tmp_path / "keys.json", "{" + ",".join(f'"{i:08d}":0' for i in range(20_000)) + "}")
    # 12 to 24 bytes a key, and for a moment 2.5 times that: a million takes less than 50 MB. Strings take twice as much
    assert peak(json_items(keys)) < 20_000 * 50 + 1_500_000


# ------------------------------------------------------------------------------------------------- faults of JSON

FAULTS = {
    "nothing": "",
    "blank": " \n",
    "cut in a value": '{"a": {"b": 1}, "c": {"d": [1, 2',
    "cut in a string": '{"a": "b',
    "cut after an entry": '{"a": 1,',
    "text behind": '{"a": 1} x',
    "another object": '{"a": 1} {"b": 2}',
    "comma": '{"a": 1,}',
    "quotes": "{'a': 1}",
    "comment": '{"a": 1 /* one */}',
    "NaN": '{"a": {"x": NaN}}',
    "nan": '{"a": {"x": nan}}',
    "Infinity": '{"a": [Infinity]}',
    "inf": '{"a": [inf]}',
    "-Infinity": '{"a": -Infinity}',
    "-inf": '{"a": -inf}',
    "too large": '{"a": {"x": 1e999}}',
    "too small": '{"a": [-1e999]}',
    "too small, alone": '{"a": -1e999}',
    "many digits": '{"a": ' + "9" * 5000 + "}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "surrogate bytes": b'{"a": "\xed\xa0\x80"}',
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "control character": '{"a": "\x01"}',
    "a key twice": '{"a": 1, "b": 2, "a": 1}',
    "a key twice in a record": '{"a": {"x": 1, "y": 2, "x": 1}}',
    "a key twice deep down": '{"a": {"l": [{"o": {"x": 1, "x": {}}}]}}',
    "HTML": "<!DOCTYPE html><html></html>",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_json_stops_the_work(tmp_path, backend, fault):
    path = write(tmp_path / "x.json", FAULTS[fault])
    with refusal("D47") as told:
        list(json_items(path, backend=backend))
    assert str(path) in told.value.where
    if "twice" in fault:
        assert "twice" in told.value.what


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"nothing", "blank", "UTF-16", "a key twice", "many digits"}))
def test_broken_lines_stop_the_work(tmp_path, fault):
    data = FAULTS[fault]
    bad = data if isinstance(data, bytes) else data.encode()
    path = write(tmp_path / "x.jsonl", b'{"good": 1}\n' + bad + b"\n")
    with refusal("D47", "line 2") as told:
        list(json_lines(path))
    assert str(path) in told.value.where


def test_lines_of_other_kinds_of_wrong(tmp_path):
    for text, says in (("9" * 5000, "line 1"), ('{"a": 1, "a": 2}', "twice"), ('"\\ud800"', "surrogate")):
        with refusal("D47", says):
            list(json_lines(write(tmp_path / "x.jsonl", text)))
    with refusal("D47", "byte order mark"):
        list(json_lines(write(tmp_path / "x.jsonl", '{"a": 1}'.encode("utf-16"))))


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE", 1000)
    assert len(list(json_lines(write(tmp_path / "x.jsonl", '"' + "x" * 997 + '"\n')))) == 1
    with refusal("D47", "too long"):
        list(json_lines(write(tmp_path / "x.jsonl", '"' + "x" * 999 + '"\n')))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("text", "got"), [("[1]", "array"), ("3", "number"), ("null", "null"), ('"a"', "string")])
def test_json_of_another_kind_at_the_top(tmp_path, backend, text, got):
    with refusal("D47", "another kind") as told:
        list(json_items(write(tmp_path / "x.json", text), backend=backend))
    assert got in str(told.value.got)
    with refusal("D47", "another kind"):
        list(json_array(write(tmp_path / "y.json", '{"a": 1}'), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_json_that_is_nested_too_deep(tmp_path, backend, pair):
    def nested(depth: int) -> str:
        opens = "[" if pair == "[]" else '{"k":'
        return opens * depth + ("1" if pair == "{}" else "") + pair[1] * depth

    limit = streams.MAX_DEPTH
    items, lines = tmp_path / "x.json", tmp_path / "x.jsonl"
    assert len(list(json_items(write(items, f'{{"a":{nested(limit - 1)}}}'), backend=backend))) == 1
    assert len(list(json_lines(write(lines, nested(limit))))) == 1
    for depth in (limit + 1, DEEP):
        write(items, f'{{"a":{nested(depth - 1)}, "b": [1]}}')
        with refusal("D47", "too deep"):
            list(json_items(items, backend=backend))
        with refusal("D47", "too deep"):
            list(json_array(items, "b.item", backend=backend))
        with refusal("D47", "too deep"):
            list(json_array(write(items, f"[{nested(depth - 1)}]"), backend=backend))
        with refusal("D47", "too deep"):
            list(json_lines(write(lines, nested(depth))))
    with refusal("D47"):  # without the ends
        list(json_items(write(items, '{"a":' + nested(DEEP)[: 5 * DEEP // 2]), backend=backend))
    brackets = '{"a": "' + '[{\\"' * DEEP + '"}'  # in text they are no depth
    assert len(list(json_items(write(items, brackets), backend=backend))) == 1
    assert len(list(json_lines(write(lines, brackets)))) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_twice_on_the_way_to_an_array(tmp_path, backend):
    for text in ('{"b": [1], "a": 1, "a": 2}', '{"b": [1], "b": [2]}', '{"c": {"b": [1], "x": 0, "x": 1}}'):
        with refusal("D47", "twice"):
            list(json_array(write(tmp_path / "x.json", text), "c.b.item" if "c" in text else "b.item", backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_faults_behind_an_array_are_seen(tmp_path, backend):
    for tail in ("", "} x", ', "z": NaN}', ', "z": {"y": 1}'):
        with refusal("D47"):
            list(json_array(write(tmp_path / "x.json", '{"b": [1, 2]' + tail), "b.item", backend=backend))


def test_keys_that_are_unique_over_files(tmp_path):
    one, two = write(tmp_path / "1.json", '{"a": 1, "b": 1}'), write(tmp_path / "2.json", '{"c": 1, "b": 1}')
    seen = streams.Hashes()
    assert len(list(json_items(one, seen=seen))) == 2
    with refusal("D47", "'b' comes twice") as told:
        list(json_items(two, seen=seen))
    assert "2.json, after entry 1" in told.value.where
    assert "'c'" in told.value.where


def test_the_place_of_a_fault_in_json_is_named(tmp_path):
    text = json.dumps({f"k{i}": RECORD for i in range(200)})[:-30]
    with refusal("D47") as told:
        list(json_items(write(tmp_path / "x.json", text)))
    assert told.value.where == f"{tmp_path / 'x.json'}, after entry 199 (key 'k198'), before byte {len(text.encode())}"


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.dictionaries(TEXT, VALUES, max_size=5), ascii=st.booleans())
def test_any_json_is_read_as_json_reads_it(tmp_path_factory, backend, data, ascii):
    path = write(tmp_path_factory.getbasetemp() / f"any-{backend}.json", json.dumps(data, ensure_ascii=ascii))
    assert list(json_items(path, backend=backend)) == list(json.loads(path.read_bytes()).items())
    lines = write(tmp_path_factory.getbasetemp() / "any.jsonl", json.dumps(data, ensure_ascii=ascii) + "\n")
    assert list(json_lines(lines)) == [(1, data)]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.dictionaries(TEXT, VALUES, min_size=1, max_size=4), share=st.floats(0, 1, exclude_max=True))
def test_any_cut_in_json_is_seen(tmp_path_factory, backend, data, share):
    text = json.dumps(data).encode()
    path = write(tmp_path_factory.getbasetemp() / f"cut-{backend}.json", text[: int(share * len(text))])
    with refusal("D47"):
        list(json_items(path, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.dictionaries(TEXT, VALUES, max_size=4), at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_damaged_json_gives_values_or_an_error_of_ours(tmp_path_factory, backend, data, at, byte):
    text = bytearray(json.dumps(data).encode())
    text[at % len(text)] = byte
    path = write(tmp_path_factory.getbasetemp() / f"hit-{backend}.json", bytes(text))
    try:
        read = list(json_items(path, backend=backend))
    except SayoError as error:
        assert error.code in ("D47", "D48")  # noqa: PT017
    else:
        assert len(read) == len({key for key, _ in read})


# ------------------------------------------------------------------------------------------------- containers

MEMBERS = ("../x.json", "a/../../x.json", "/x.json", "C:/x.json", "C:x.json", "..\\x.json", "\\\\server\\x.json")


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("read", [True, False])
def test_names_that_lead_out_of_the_archive(tmp_path, name, read):
    members = {name: '{"a": 1}'} if read else {"good.json": '{"a": 1}', name.replace(".json", ".txt"): "x"}
    with refusal("D41", "leads out"):
        list(json_items(zipped(tmp_path / "x.zip", members)))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices(tmp_path, kind):
    archive = zipped(tmp_path / "x.zip", {"x.json": "/etc/passwd"}, create_system=3, external_attr=(kind | 0o644) << 16)
    with refusal("D41", "link or a device"):
        list(json_items(archive))


def test_what_unpacks_to_far_more(tmp_path):
    bomb = b'{"a": "' + b"0" * (4 * 2**20) + b'"}'
    with refusal("D41", "fold"):
        list(json_items(zipped(tmp_path / "x.zip", {"x.json": bomb})))
    for read in (json_items, json_lines):
        with refusal("D48", "far more"):
            list(read(write(tmp_path / "x.gz", gzip.compress(bomb))))
    small = b'{"a": "' + b"0" * (2**19) + b'"}'  # packs as well, but can hurt no one
    assert len(list(json_items(zipped(tmp_path / "y.zip", {"x.json": small})))) == 1
    assert len(list(json_items(write(tmp_path / "y.gz", gzip.compress(small))))) == 1


def test_an_archive_that_unpacks_to_more_than_the_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_BYTES", 2**17)
    text = json.dumps({str(i): f"{i * 7919 % 10007:x}" for i in range(12_000)}).encode()
    assert len(text) > 2**17
    with refusal("D41", "bytes, more than"):
        list(json_items(zipped(tmp_path / "x.zip", {"x.json": text})))
    with refusal("D48", "far more"):
        list(json_items(write(tmp_path / "x.gz", gzip.compress(text))))


def test_an_archive_that_lies_about_its_size(tmp_path):
    text = json.dumps({str(i): RECORD for i in range(500)}).encode()
    path = zipped(tmp_path / "x.zip", {"x.json": text})
    data = bytearray(path.read_bytes())
    for header, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(header) + offset
        data[at : at + 4] = (100).to_bytes(4, "little")
    with pytest.raises(SayoError, match=r"^SAYO-D4[78]: ") as told:
        list(json_items(write(tmp_path / "y.zip", bytes(data))))
    assert "y.zip" in told.value.where


@pytest.mark.parametrize("reader", [json_items, json_lines])
def test_damaged_containers(tmp_path, reader):
    text = json.dumps({str(i): i for i in range(2000)}).encode()
    packed, archive = gzip.compress(text), zipped(tmp_path / "x.zip", {"x.json": text}).read_bytes()
    wrong = bytearray(packed)
    wrong[-8] ^= 1  # of the checksum
    for data in (packed[:-100], packed[:40], bytes(wrong), archive[:-30], archive[:200], b"PK\x03\x04"):
        with pytest.raises(SayoError, match=r"^SAYO-D4[78]: .+ \| at .+ \| (.* \| )?fix: .+\Z"):
            list(reader(write(tmp_path / "bad", data)))


@pytest.mark.parametrize("reader", [json_items, json_array, json_lines])
def test_no_file(tmp_path, reader):
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "a\0b"):
        with refusal("D48", "no such file"):
            list(reader(path))


def test_a_reader_that_is_left_early_closes_its_file(tmp_path):
    path = write(tmp_path / "x.json", json.dumps({str(i): i for i in range(10)}))
    reader = json_items(path)
    assert next(reader) == ("0", 0)
    reader.close()
    with pytest.raises(StopIteration):
        next(reader)
