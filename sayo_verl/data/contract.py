"""The row contract: everything that can be wrong with one row. docs/data.md has it in words.

``RowContract.look`` returns all faults of a row. The launcher raises the first one, and so does the <Focus> stage.
`sayo inspect` counts all. The probe on a worker sees no text and no pixels; it checks boxes by the same function
(``sayo_verl.vision.masks.check_boxes``). ``Demands`` says which checks apply: rows of verl's own estimators are checked
only for what verl 0.9.1 itself needs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sayo_verl.data.images import MAX_PIXELS, MAX_RATIO
from sayo_verl.data.reading import Header, read_image
from sayo_verl.data.rows import reserved_text
from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.reward import why_not_gradable
from sayo_verl.reward.prompts import IMAGE_TAG
from sayo_verl.reward.walk import is_walk, walk_of
from sayo_verl.vision.masks import check_boxes, not_an_image

PREPARE = "prepare the data again, with `sayo prepare`"
PROGRAMS = ("codecontests", "apps", "codeforces", "taco")  # verl's own reward function runs the response as a program
RUNS_TEXT = "for this data source verl's own reward function runs the model's text as code"
MESSAGES = "a list of {role, content}, content a text"


class Keys(NamedTuple):
    """Names of columns, ``data.*_key`` of a run."""

    prompt: str = "prompt"
    images: str = "images"
    videos: str = "videos"
    audios: str = "audios"


@dataclass(frozen=True)
class Demands:
    """Which checks apply to rows.

    Attributes:
        attention: an attention method trains on the rows. False: only what verl itself needs.
        rewarded: a reward function compares responses with ``reward_model.ground_truth``.
        judge: of ``sayo_verl.reward``, if that is the reward function; None: another one, which may grade anything.
        qwen_resize: images go through Qwen's resize, as in verl's own data set class.
        headers: read the header of every image.
        web: images may be web addresses.
        keys: names of columns.
    """

    attention: bool = True
    rewarded: bool = True
    judge: str | None = "text"
    qwen_resize: bool = True
    headers: bool = True
    web: bool = True
    keys: Keys = field(default=Keys())

    def columns(self) -> tuple[str, ...]:
        """Columns without which verl or its reward manager raises."""
        return (self.keys.prompt, *(("data_source", "reward_model") if self.rewarded else ()))


@dataclass
class Looked:
    """The result of the checks of one row.

    Attributes:
        faults: everything that is wrong, in the order of the checks. Empty: the row is valid.
        headers: per image; None for a web address or an invalid image.
        boxes: as in the row; empty where they are invalid.
        question: the text of the user without image tags.
        mistyped: a column has another type than verl reads, and no other check was made.
    """

    faults: list[SayoError] = field(default_factory=list)
    headers: list[Header | None] = field(default_factory=list)
    boxes: list[list[list[float]]] = field(default_factory=list)
    question: str = ""
    mistyped: bool = False

    def attempt(self, check: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The value of a check, or None if it raises; the error is added to ``faults``."""
        try:
            return check(*args, **kwargs)
        except SayoError as error:
            self.faults.append(error)
            return None


class RowContract:
    """Checks the rows of one split by ``demands``; remembers their ids."""

    def __init__(self, demands: Demands) -> None:
        self.demands = demands
        self._ids: dict[tuple[str, str], str] = {}

    def look(self, row: Mapping[str, Any], where: str) -> Looked:
        """All faults of a row, as pyarrow gives it. This never raises, whatever the types of the values."""
        demands, keys, looked = self.demands, self.demands.keys, Looked()
        looked.faults = list(_mistyped(row, where, demands))
        looked.mistyped = bool(looked.faults)
        if looked.mistyped:  # what follows reads these columns
            return looked
        images, info = row.get(keys.images) or [], row.get("extra_info") or {}
        media = {
            tag: len(row.get(key) or [])
            for tag, key in ((IMAGE_TAG, keys.images), ("<video>", keys.videos), ("<audio>", keys.audios))
        }
        looked.question = "".join(text_of(message) for message in row[keys.prompt] if message["role"] == "user")
        for tag, n in media.items():
            looked.question = looked.question.replace(tag, "") if n or tag == IMAGE_TAG else looked.question
        looked.attempt(check_placeholders, row[keys.prompt], media, where)
        if demands.rewarded and demands.judge is not None:
            truth = row["reward_model"]["ground_truth"]
            looked.attempt(_check_ground_truth, truth, where, demands.judge)
            if is_walk(row.get("data_source")):
                looked.attempt(walk_of, info, truth, f"{where}, extra_info.walk")
        if demands.attention:
            if "data_source" in row:
                looked.attempt(check_data_source, row["data_source"], f"{where}, data_source")
            looked.attempt(self.check_id, row.get("data_source"), info.get("id"), where)
            looked.attempt(_check_only_images, media, where)
            looked.attempt(_check_question, looked.question, info.get("question"), where)
            looked.boxes = looked.attempt(check_boxes, info.get("boxes"), len(images), where=where) or []
            looked.attempt(_check_lists, info, len(images), where)
        for i, image in enumerate(images if demands.headers else []):
            place = f"{where}, images[{i}]"
            header = looked.attempt(read_image, image, place, decode=False, web=demands.web)
            looked.headers.append(header)
            if header and demands.qwen_resize:
                looked.attempt(_check_ratio, header, place)
            if header and demands.attention:
                looked.attempt(_check_pixels, header, place)
                looked.attempt(check_stored, header, _declared_size(info, i), where)
        return looked

    def check_id(self, data_source: Any, name: Any, where: str) -> None:
        """Refuse the id of an earlier row of its data source; D65. Rows without an id pass."""
        before = where if name is None else self._ids.setdefault((repr(data_source), repr(name)), where)
        what, got, place = "two rows of a data source have one id", f"{name!r}, as {before}", f"{where}, extra_info.id"
        fix = "give each row an id of its own; to mix folders, prepare one of them with another --name"
        raise_first([Rule("D65", before != where, what, place, fix, got, wanted="another id for each row")])


def _mistyped(row: Mapping[str, Any], where: str, demands: Demands) -> Iterator[SayoError]:
    """D72 for each column that has another type than verl reads."""

    def wrong(column: str, got: Any, wanted: str, fix: str) -> SayoError:
        what, found = "a column has another type than verl reads", f"{type(got).__name__} {str(got)[:80]}"
        return SayoError("D72", what, where=f"{where}, {column}", got=found, wanted=wanted, fix=fix)

    key, info, reward = demands.keys.prompt, row.get("extra_info"), row.get("reward_model")
    prompt = row.get(key)
    if not isinstance(prompt, list) or not prompt:
        yield wrong(key, prompt, MESSAGES, f"store [{{'role': 'user', 'content': ...}}] in {key}, not text")
    else:
        yield from (wrong(key, got, MESSAGES, fix) for got, fix in list(_wrong_parts(prompt))[:1])
    for key in demands.keys[1:]:
        if not isinstance(row.get(key), list | None):
            yield wrong(key, row[key], "a list, one entry each", f"store a list in {key}, also for a single one")
    if not isinstance(info, dict | None):
        yield wrong("extra_info", info, "a struct (a dict), or null", "store the fields as a struct, not as JSON text")
    if demands.rewarded and (not isinstance(reward, dict) or "ground_truth" not in reward):
        fix = "store {'style': 'rule', 'ground_truth': ...}"
        yield wrong("reward_model", reward, "a struct {style, ground_truth}", fix)


def _wrong_parts(prompt: list[Any]) -> Iterator[tuple[Any, str]]:
    """(message or part, fix) of what verl cannot read in a prompt."""
    for message in prompt:
        fields = message if isinstance(message, dict) else {}
        content = fields.get("content")
        if {"from", "value"} <= fields.keys():
            yield message, "rename from to role and value to content; human is user, gpt is assistant"
        elif not isinstance(fields.get("role"), str) or not isinstance(content, str | list):
            yield message, "write each message as {'role': 'user', 'content': '<image>...'}"
        # All parts of a parquet column have the same fields, and Qwen's reader opens a field "image", also if null.
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
                yield part, "write one text with <image> in it, and the images in a column of their own"


def text_of(message: Mapping[str, Any]) -> str:
    """The content of a message, which may be in parts, as one text."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def check_placeholders(prompt: Sequence[Mapping[str, Any]], media: Mapping[str, int], where: str) -> None:
    """Refuse messages that do not name each image, video and audio once; ``media`` counts them by their tag; D09."""
    texts = [message["content"] for message in prompt if isinstance(message["content"], str)]
    for tag, n in media.items():
        found, kind = sum(text.count(tag) for text in texts), tag.strip("<>")
        # Without any medium verl does not look for placeholders. A lone <image> is a row whose image is missing.
        wrong = found != n and (tag == IMAGE_TAG or any(media.values()))
        what = f"the prompt does not name each {kind} once" if n else f"the row has no {kind} but its prompt names one"
        fix = f"put one {tag} into the user's message for each {kind}; data.{kind}_key names their column"
        got, wanted = f"{found} {tag} placeholders, {n} {kind}s", "as many placeholders as entries"
        raise_first([Rule("D09", wrong, what, where, fix, got, wanted)])


def _check_question(asked: str, question: Any, where: str) -> None:
    """Refuse a prompt without a question, and reserved text in it or in ``extra_info.question``; D66."""
    reserved = (reserved_text(question) if isinstance(question, str) else None) or reserved_text(asked)
    what, fix = "a question holds text that stands for an image or a control token", "remove the text, or the row"
    raise_first([Rule("D66", reserved is not None, what, where, fix, got=reserved)])
    raise_first([Rule("D66", not asked.strip(), "a row has no question", where, fix="remove the row")])


def _check_ground_truth(truth: Any, where: str, judge: str) -> None:
    reason = why_not_gradable(truth, judge=judge)
    what, wanted = f"a ground truth cannot be graded ({reason})", "the answer alone, as sayo_verl.reward compares it"
    fix = "correct the answer or remove the row; or set a reward function of your own"
    where = f"{where}, reward_model.ground_truth"
    raise_first([Rule("D74", reason is not None, what, where, fix, repr(truth)[:80], wanted)])


def check_data_source(name: Any, where: str) -> None:
    """Refuse a missing name, and one for which verl's own reward function evaluates text of the model; D66."""
    text = name.lower() if isinstance(name, str) else ""
    missing, fix = "a row has no data source", "name the kind of data; verl's metrics are kept by it"
    raise_first([Rule("D66", not text.strip(), missing, where, fix, repr(name)[:80], wanted="a name")])
    rename = "rename the data source, such as my/name"
    raise_first([Rule("D66", runs_text(name), RUNS_TEXT, where, rename, got=name, wanted="any other name")])


def runs_text(data_source: Any) -> bool:
    """Whether verl's own reward function runs the model's text as code: for math of Numina with ``eval``
    (CVE-2026-6878), for programs because that is their task."""
    text = data_source.lower() if isinstance(data_source, str) else ""
    return text.startswith("numina") or text in PROGRAMS


def _check_only_images(media: Mapping[str, int], where: str) -> None:
    for tag in ("<video>", "<audio>"):
        if media[tag]:
            raise not_an_image(f"{where}, {tag.strip('<>')}s", media[tag])


def _check_lists(info: Mapping[str, Any], n_images: int, where: str) -> None:
    """Refuse names that are not nested as the boxes are, and lists without one entry for each image; D05."""
    names, boxes = info.get("box_names"), info.get("boxes")
    if names is not None and boxes:
        got, wanted = _lengths(names), _lengths(boxes)
        wrong, nesting = not isinstance(names, list) or got != wanted, "box names are not nested as the boxes are"
        raise_first([Rule("D05", wrong, nesting, f"{where}, extra_info.box_names", PREPARE, got, wanted)])
    for key in ("image_keys", "image_size_wh"):
        entries = info.get(key)
        n = len(entries) if isinstance(entries, list) else type(entries).__name__
        what, wrong = "a list does not have one entry per image", entries is not None and n != n_images
        raise_first([Rule("D05", wrong, what, f"{where}, extra_info.{key}", PREPARE, n, n_images)])


def _lengths(nested: Any) -> list[int]:
    each = nested if isinstance(nested, list) else []
    return [len(of_image) if isinstance(of_image, list) else 0 for of_image in each]


def _declared_size(info: Mapping[str, Any], i: int) -> list[int] | None:
    sizes = info.get("image_size_wh")
    return sizes[i] if isinstance(sizes, list) and i < len(sizes) and isinstance(sizes[i], list) else None


def _check_pixels(header: Header, where: str) -> None:
    got, wanted = f"{header.width} x {header.height}", f"at most {MAX_PIXELS} pixels"
    large = header.width * header.height > MAX_PIXELS
    raise_first([Rule("D08", large, "an image is too large", where, "resize it", got, wanted)])


def _check_ratio(header: Header, where: str) -> None:
    ratio = max(header.width, header.height) / max(1, min(header.width, header.height))
    what = "an image is too narrow: Qwen's resize refuses it, and the run ends there"
    fix = "crop or remove it; with data.filter_overlong_prompts=True verl leaves the row out"
    got, wanted = f"{header.width} x {header.height}, a ratio of {ratio:g}", f"a ratio of at most {MAX_RATIO:g}"
    raise_first([Rule("D77", ratio > MAX_RATIO, what, where, fix, got, wanted)])


def check_stored(header: Header, declared: Sequence[int] | None, where: str) -> None:
    """Refuse an image that is not upright or not of the (width, height) that its row says; D67."""
    turned = "a stored image is not upright: its EXIF orientation turns it in a viewer, and not in verl"
    turn = "turn the pixels and remove the tag, as `sayo prepare` does; boxes belong to the stored pixels"
    got = f"EXIF orientation {header.orientation}"
    raise_first([Rule("D67", header.orientation != 1, turned, where, turn, got, wanted="1 or none")])
    other = declared is not None and list(declared) != [header.width, header.height]
    what, fix = "a stored image has another size than its row says", f"{PREPARE}: boxes may be of another picture"
    where, wanted = f"{where}, extra_info.image_size_wh", " x ".join(map(str, declared or ()))
    raise_first([Rule("D67", other, what, where, fix, f"{header.width} x {header.height}", wanted)])
