"""The row contract: everything that can be wrong with one row, in one function.

docs/data.md has the contract in words and says which check runs where. ``RowContract.look`` returns all faults of a
row. The launcher raises the first one (``sayo_verl.data.check``), and so does the <Focus> stage. `sayo inspect` counts
all (``sayo_verl.inspection``). The probe on a worker sees no text and no pixels. It judges boxes by the same function
(``sayo_verl.vision.masks.check_boxes``). `sayo prepare` leaves rows out by the same rules for text
(``rows.check_text``).

``Demands`` says which checks apply. Rows of verl's own estimators are checked only for what verl 0.9.1 itself needs.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sayo_verl.data.images import MAX_PIXELS, MAX_RATIO
from sayo_verl.data.reading import Header, read_image
from sayo_verl.data.rows import IMAGE_TAG, reserved_text
from sayo_verl.errors import SayoError
from sayo_verl.reward import why_not_gradable
from sayo_verl.vision.masks import check_boxes, not_an_image

PREPARE = "prepare the data again, with `sayo prepare`"
# Data sources for which verl's own reward function evaluates the model's text or runs it as a program.
EVALUATED = ("codecontests", "apps", "codeforces", "taco")
# verl chooses its own reward functions by this name. None of them is meant for prepared rows.
PREPARED_SOURCE = re.compile(r"sayo/[a-z0-9_.-]+")


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
        keys: names of columns.
    """

    attention: bool = True
    rewarded: bool = True
    judge: str | None = "text"
    qwen_resize: bool = True
    headers: bool = True
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
    """Checks the rows of one split; remembers their ids.

    Args:
        demands: which checks apply.
    """

    def __init__(self, demands: Demands) -> None:
        self.demands = demands
        self._ids: dict[tuple[str, str], str] = {}

    def look(self, row: Mapping[str, Any], where: str) -> Looked:
        """All faults of a row. This never raises, whatever the types of the values.

        Args:
            row: as pyarrow gives it.
            where: names the row in messages.
        """
        demands, keys, looked = self.demands, self.demands.keys, Looked()
        for check in (check_prompt, check_media, check_extra_info, check_reward_model):
            looked.attempt(check, row, where, demands)
        looked.mistyped = bool(looked.faults)
        if looked.mistyped:  # what follows reads these columns
            return looked
        images, info = row.get(keys.images) or [], row.get("extra_info") or {}
        media = {
            tag: len(row.get(key) or [])
            for tag, key in ((IMAGE_TAG, keys.images), ("<video>", keys.videos), ("<audio>", keys.audios))
        }
        looked.question = _text_of_user(row[keys.prompt])
        for tag, n in media.items():
            looked.question = looked.question.replace(tag, "") if n or tag == IMAGE_TAG else looked.question
        looked.attempt(check_placeholders, row[keys.prompt], media, where)
        if demands.rewarded and demands.judge is not None:
            looked.attempt(check_ground_truth, row["reward_model"], where, demands.judge)
        if demands.attention:
            if "data_source" in row:
                looked.attempt(check_data_source, row["data_source"], where)
            looked.attempt(check_id, row.get("data_source"), info.get("id"), self._ids, where)
            looked.attempt(check_only_images, media, where)
            looked.attempt(check_question, looked.question, info.get("question"), where)
            looked.boxes = looked.attempt(check_boxes, info.get("boxes"), len(images), where=where) or []
            looked.attempt(check_lists, info, len(images), where)
        if demands.headers:
            for i, image in enumerate(images):
                looked.headers.append(self._image(looked, image, info, i, where))
        return looked

    def _image(self, looked: Looked, image: Any, info: Mapping[str, Any], i: int, where: str) -> Header | None:
        header: Header | None = looked.attempt(read_image, image, f"{where}, images[{i}]", decode=False)
        if header is None:
            return None
        if self.demands.qwen_resize:
            looked.attempt(check_ratio, header, f"{where}, images[{i}]")
        if self.demands.attention:
            looked.attempt(check_pixels, header, f"{where}, images[{i}]")
            looked.attempt(check_stored, header, declared_size(info, i), where)
        return header


# ------------------------------------------------------------------------------------------ types: what verl can read


def _wrong_type(where: str, got: Any, wanted: str, fix: str) -> SayoError:
    return SayoError(
        "D72",
        "a column has another type than verl reads",
        where=where,
        got=f"{type(got).__name__} {str(got)[:80]}",
        wanted=wanted,
        fix=fix,
    )


def check_prompt(row: Mapping[str, Any], where: str, demands: Demands) -> None:
    """Refuse a prompt that is not a list of messages; D72."""
    prompt, key = row.get(demands.keys.prompt), demands.keys.prompt
    where, wanted = f"{where}, {key}", "a list of {role, content}, content a text"
    if not isinstance(prompt, list) or not prompt:
        raise _wrong_type(where, prompt, wanted, f"store [{{'role': 'user', 'content': ...}}] in {key}, not text")
    for message in prompt:
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str | list):
            fix = "rename from to role and value to content; human is user, gpt is assistant"
            raise _wrong_type(
                where,
                message,
                wanted,
                fix
                if {"from", "value"} <= fields.keys()
                else "write each message as {'role': 'user', 'content': '<image>...'}",
            )
        if isinstance(fields["content"], list):
            _check_parts(fields["content"], where, wanted)


def _check_parts(parts: list[Any], where: str, wanted: str) -> None:
    # All parts of a parquet column have the same fields, and Qwen's reader opens a field "image", also if null.
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise _wrong_type(
                where, part, wanted, "write one text with <image> in it, and the images in a column of their own"
            )


def check_media(row: Mapping[str, Any], where: str, demands: Demands) -> None:
    """Refuse a column of images, videos or audios that is not a list; D72. It may be null or missing."""
    for key in demands.keys[1:]:
        if not isinstance(row.get(key), list | None):
            raise _wrong_type(
                f"{where}, {key}",
                row[key],
                "a list, with one entry for each",
                f"store a list in {key}, also for a single one",
            )


def check_extra_info(row: Mapping[str, Any], where: str, demands: Demands) -> None:
    """Refuse an ``extra_info`` that is not a struct; D72."""
    if not isinstance(row.get("extra_info"), dict | None):
        raise _wrong_type(
            f"{where}, extra_info",
            row["extra_info"],
            "a struct (a dict), or null",
            "store the fields as a struct, not as JSON text",
        )


def check_reward_model(row: Mapping[str, Any], where: str, demands: Demands) -> None:
    """Refuse a ``reward_model`` without a field ``ground_truth``, which verl's reward managers read; D72."""
    found = row.get("reward_model")
    if demands.rewarded and (not isinstance(found, dict) or "ground_truth" not in found):
        raise _wrong_type(
            f"{where}, reward_model",
            found,
            "a struct {style, ground_truth}",
            "store {'style': 'rule', 'ground_truth': ...}",
        )


# ---------------------------------------------------------------------------------------------------- text and answers


def _text_of_user(prompt: Sequence[Mapping[str, Any]]) -> str:
    parts = [m["content"] for m in prompt if m["role"] == "user"]
    return "".join(p if isinstance(p, str) else "".join(part["text"] for part in p) for p in parts)


def check_placeholders(prompt: Sequence[Mapping[str, Any]], media: Mapping[str, int], where: str) -> None:
    """Refuse a prompt that does not name each image, video and audio once; D09.

    Args:
        prompt: messages.
        media: placeholder -> entries of the row's column.
        where: names the row.
    """
    texts = [message["content"] for message in prompt if isinstance(message["content"], str)]
    for tag, n in media.items():
        found = sum(text.count(tag) for text in texts)
        # Without any medium verl does not look for placeholders. A lone <image> is a row whose image is missing.
        if found != n and (tag == IMAGE_TAG or any(media.values())):
            kind = tag.strip("<>")
            raise SayoError(
                "D09",
                f"the prompt does not name each {kind} once"
                if n
                else f"the row has no {kind} but its prompt names one",
                where=where,
                got=f"{found} {tag} placeholders, {n} {kind}s",
                wanted="as many placeholders as entries",
                fix=f"put one {tag} into the user's message for each {kind}; data.{kind}_key names their column",
            )


def check_question(asked: str, question: Any, where: str) -> None:
    """Refuse a prompt without a question, or with text that stands for an image or a control token; D66.

    Args:
        asked: the user's text without image tags.
        question: ``extra_info.question``, which may hold an image tag that ``asked`` has lost.
        where: names the row.
    """
    reserved = (reserved_text(question) if isinstance(question, str) else None) or reserved_text(asked)
    if reserved:
        raise SayoError(
            "D66",
            "a question holds text that stands for an image or a control token",
            where=where,
            got=reserved,
            fix="remove the text, or the row",
        )
    if not asked.strip():
        raise SayoError("D66", "a row has no question", where=where, fix="remove the row")


def check_ground_truth(reward_model: Mapping[str, Any], where: str, judge: str) -> None:
    """Refuse a ground truth that ``sayo_verl.reward`` cannot grade; D74."""
    truth = reward_model.get("ground_truth")
    reason = why_not_gradable(truth, judge=judge)
    if reason is not None:
        raise SayoError(
            "D74",
            f"a ground truth cannot be graded ({reason})",
            where=f"{where}, reward_model.ground_truth",
            got=repr(truth)[:80],
            wanted="the answer alone, as sayo_verl.reward compares it",
            fix="correct the answer or remove the row; or set a reward function of your own",
        )


# -------------------------------------------------------------------------------------- what attention methods add


def check_data_source(name: Any, where: str) -> None:
    """Refuse a missing name, and one for which verl's own reward function evaluates text of the model; D66."""
    if not isinstance(name, str) or not name.strip():
        raise SayoError(
            "D66",
            "a row has no data source",
            where=f"{where}, data_source",
            got=repr(name),
            wanted="a name",
            fix="name the kind of data; verl's metrics are kept by it",
        )
    if name.lower().startswith("numina") or name.lower() in EVALUATED:
        raise SayoError(
            "D66",
            "for this data source verl's own reward function evaluates the model's text as code",
            where=f"{where}, data_source",
            got=name,
            wanted="any other name",
            fix="rename the data source, such as my/name",
        )


def check_prepared_source(name: Any, where: str) -> None:
    """Refuse a data source that `sayo prepare` does not write; D52. All that it writes pass ``check_data_source``."""
    if not isinstance(name, str) or not PREPARED_SOURCE.fullmatch(name):
        raise SayoError(
            "D52",
            "the name of a data source is not that of prepared data",
            where=where,
            got=repr(name)[:80],
            wanted=PREPARED_SOURCE.pattern,
            fix="name it sayo/..., in small letters",
        )


def check_id(data_source: Any, name: Any, ids: dict[tuple[str, str], str], where: str) -> None:
    """Refuse the id of an earlier row of its data source; D65. Rows without an id pass.

    Args:
        data_source: of the row.
        name: its id.
        ids: remembers where each was.
        where: names the row.
    """
    if name is None:
        return
    before = ids.setdefault((repr(data_source), repr(name)), where)
    if before != where:
        raise SayoError(
            "D65",
            "two rows of a data source have one id",
            where=f"{where}, extra_info.id",
            got=f"{name!r}, as {before}",
            wanted="another id for each row",
            fix="prepare the data again",
        )


def check_only_images(media: Mapping[str, int], where: str) -> None:
    """Refuse videos and audios; D66."""
    for tag in ("<video>", "<audio>"):
        if media[tag]:
            raise not_an_image(f"{where}, {tag.strip('<>')}s", media[tag])


def check_lists(info: Mapping[str, Any], n_images: int, where: str) -> None:
    """Refuse names that are not nested as the boxes are, and lists without one entry for each image; D05."""
    names, boxes = info.get("box_names"), info.get("boxes")
    if names is not None and boxes:
        got, wanted = (
            [len(of_image) if isinstance(of_image, list) else 0 for of_image in each] if isinstance(each, list) else []
            for each in (names, boxes)
        )
        if not isinstance(names, list) or got != wanted:
            raise SayoError(
                "D05",
                "box names are not nested as the boxes are",
                where=f"{where}, extra_info.box_names",
                got=got,
                wanted=wanted,
                fix=PREPARE,
            )
    for key in ("image_keys", "image_size_wh"):
        entries = info.get(key)
        n = len(entries) if isinstance(entries, list) else type(entries).__name__
        if entries is not None and n != n_images:
            raise SayoError(
                "D05",
                "a list does not have one entry per image",
                where=f"{where}, extra_info.{key}",
                got=n,
                wanted=n_images,
                fix=PREPARE,
            )


# -------------------------------------------------------------------------------------------------------------- images


def declared_size(info: Mapping[str, Any], i: int) -> list[int] | None:
    """``[width, height]`` of an image in ``extra_info.image_size_wh``; None if it is missing."""
    sizes = info.get("image_size_wh")
    return sizes[i] if isinstance(sizes, list) and i < len(sizes) and isinstance(sizes[i], list) else None


def check_pixels(header: Header, where: str) -> None:
    """Refuse an image that is too large; D08."""
    if header.width * header.height > MAX_PIXELS:
        raise SayoError(
            "D08",
            "an image is too large",
            where=where,
            got=f"{header.width} x {header.height}",
            wanted=f"at most {MAX_PIXELS} pixels",
            fix="resize it",
        )


def check_ratio(header: Header, where: str) -> None:
    """Refuse an image that Qwen's resize refuses; D77."""
    long, short = max(header.width, header.height), max(1, min(header.width, header.height))
    if long / short > MAX_RATIO:
        raise SayoError(
            "D77",
            "an image is too narrow: Qwen's resize refuses it, and the run ends there",
            where=where,
            got=f"{header.width} x {header.height}, a ratio of {long / short:g}",
            wanted=f"a ratio of at most {MAX_RATIO:g}",
            fix="crop or remove it; with data.filter_overlong_prompts=True verl leaves the row out",
        )


def check_stored(header: Header, declared: Sequence[int] | None, where: str) -> None:
    """Refuse an image that is not stored as the boxes were drawn on it; D67.

    Args:
        header: of the image.
        declared: result of ``declared_size``.
        where: names the row.
    """
    if header.orientation != 1:
        raise SayoError(
            "D67",
            "a stored image is not upright: its EXIF orientation turns it in a viewer, and not in verl",
            where=where,
            got=f"EXIF orientation {header.orientation}",
            wanted="1 or none",
            fix="turn the pixels and remove the tag, as `sayo prepare` does; boxes belong to the stored pixels",
        )
    if declared is not None and list(declared) != [header.width, header.height]:
        raise SayoError(
            "D67",
            "a stored image has another size than its row says",
            where=f"{where}, extra_info.image_size_wh",
            got=f"{header.width} x {header.height}",
            wanted=" x ".join(map(str, declared)),
            fix="prepare the data again: boxes may be of another picture",
        )
