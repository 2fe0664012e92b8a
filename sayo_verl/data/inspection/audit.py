"""What can be seen in finished parquet without a model: the cheap half of `sayo inspect`, which goes over every row.

No picture is decoded here: of each image the header is read and the bytes are hashed. Nothing stops at the first
mistake. What is wrong becomes a ``Finding``, counted, with the first rows named; only what cannot be read at all is a
``SayoError``.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sayo_verl.data.check import check_boxes, check_data_source, check_id, check_placeholders, check_stored
from sayo_verl.data.inspection.files import PREPARE, Data, check_manifest, check_schemas
from sayo_verl.data.inspection.findings import Findings
from sayo_verl.data.reading import digest, open_parquet, read_image, read_rows
from sayo_verl.data.rows import IMAGE_TAG, RESERVED

COLUMNS = ("data_source", "prompt", "images", "reward_model", "extra_info")
FORMATS = ("JPEG", "PNG", "WEBP")
WHOLE = 0.99  # share of the image from which a box counts as all of it
MANY = 0.05  # share of rows from which what is neutral is worth a warning


@dataclass
class Figures:
    """What there is.

    Attributes:
        rows: split -> rows.
        images, distinct_images: in all rows, and those of different bytes.
        boxes_per_row: number of boxes -> rows; rows whose boxes are malformed are not among them.
        sources, kinds, box_sources: name -> rows.
        formats: of images -> images.
        whole_image_rows: rows with a box that is the whole image.
    """

    rows: Counter[str] = field(default_factory=Counter)
    images: int = 0
    distinct_images: int = 0
    boxes_per_row: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    box_sources: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    whole_image_rows: int = 0


class Audit:
    """Goes over every row of a data set.

    Args:
        data: its files.
        tick: called once a row.
    """

    def __init__(self, data: Data, tick: Callable[[], None] = lambda: None) -> None:
        self.data, self.tick = data, tick
        self.findings, self.figures = Findings(), Figures()
        self._held_out: dict[tuple[str, Any], str] = {}  # ("name", key) or ("bytes", hash) of validation -> where
        self._seen: set[bytes] = set()

    def run(self) -> tuple[Findings, Figures]:
        """Check everything.

        Raises:
            SayoError: D02 for a file that cannot be read.
        """
        for folder in self.data.folders:
            check_manifest(folder, self.findings)
        check_schemas(self.data.train, self.findings)
        check_schemas(self.data.val, self.findings)
        for split, paths in (("val", self.data.val), ("train", self.data.train)):  # train is compared with validation
            ids: dict[tuple[Any, Any], str] = {}
            questions: dict[Any, str] = {}
            for path in paths:
                self._file(path, split, ids, questions)
        self.figures.distinct_images = len(self._seen)
        self._of_all_rows()
        return self.findings, self.figures

    def _file(self, path: Path, split: str, ids: dict[tuple[Any, Any], str], questions: dict[Any, str]) -> None:
        file = open_parquet(path)
        missing = [column for column in COLUMNS if column not in file.schema_arrow.names]
        if missing or file.metadata.num_rows == 0:
            self.findings.add("D03", "FAIL", "a parquet file lacks columns or rows",
                              f"{path}: no {', '.join(missing) or 'rows'}", PREPARE)  # fmt: skip
            return
        videos = [name for name in ("videos", "audios") if name in file.schema_arrow.names]
        for row, values in enumerate(read_rows(file, path, [*COLUMNS, *videos])):
            self._row(values, split, f"{path} row {row}", ids, questions, videos)
            self.tick()

    def _row(self, values: dict[str, Any], split: str, where: str, ids: dict[tuple[Any, Any], str],
             questions: dict[Any, str], videos: Iterable[str]) -> None:  # fmt: skip
        found, figures = self.findings, self.figures
        images, info, source = values["images"] or [], values["extra_info"] or {}, values["data_source"]
        prompt = values["prompt"] or []
        figures.rows[split] += 1
        figures.sources[str(source)] += 1
        figures.kinds[info.get("kind") or "-"] += 1
        figures.box_sources[info.get("box_source") or "-"] += 1
        found.attempt(check_data_source, source, where)
        found.attempt(check_id, source, info.get("id"), ids, where)
        found.attempt(check_placeholders, prompt, len(images), where)
        right = found.attempt(check_boxes, info, len(images), where) is not None
        for name in videos:
            if values[name]:
                found.add("D66", "FAIL", "a row has a video or an audio, and boxes lie in images only",
                          f"{where}, {name}", "remove it")  # fmt: skip
        if right:
            self._boxes(info.get("boxes") or [])
        self._nesting(info, len(images), where)
        question = self._text(prompt, info, values["reward_model"], where)
        hashes = self._images(images, info.get("image_size_wh"), where)
        names = info.get("image_keys") or []
        self._apart([("name", (source, name)) for name in names] + [("bytes", h) for h in hashes], split, where)
        asked = (question, *(names or hashes))
        if images and asked in questions:
            found.add("D65", "WARN", "the same question about the same images is there twice",
                      f"{where} and {questions[asked]}: {question[:60]!r}", "remove one of them")  # fmt: skip
        questions.setdefault(asked, where)

    def _boxes(self, boxes: list[list[list[float]]]) -> None:
        flat = [box for of_image in boxes for box in of_image]
        self.figures.boxes_per_row[len(flat)] += 1
        self.figures.whole_image_rows += any((x1 - x0) * (y1 - y0) >= WHOLE for x0, y0, x1, y1 in flat)

    def _nesting(self, info: dict[str, Any], n_images: int, where: str) -> None:
        """Lists that go with the boxes or the images."""
        names, boxes = info.get("box_names"), info.get("boxes") or []
        got, wanted = ([len(of_image or []) if isinstance(of_image, list | None) else 0 for of_image in each]
                       for each in (names or [], boxes))  # fmt: skip
        if names is not None and got != wanted:
            self.findings.add("D05", "FAIL", "box names are not nested as the boxes are",
                              f"{where}, extra_info.box_names: got {got}, wanted {wanted}", PREPARE)  # fmt: skip
        for key in ("image_keys", "image_size_wh"):
            told = info.get(key)
            if told is not None and len(told) != n_images:
                self.findings.add("D05", "FAIL", "a list does not have one entry per image",
                                  f"{where}, extra_info.{key}: got {len(told)}, wanted {n_images}",
                                  PREPARE)  # fmt: skip

    def _text(self, prompt: list[dict[str, Any]], info: dict[str, Any], reward: Any, where: str) -> str:
        """The question, checked with the answer."""
        asked = "".join(m["content"] for m in prompt if m["role"] == "user" and isinstance(m["content"], str))
        question = info["question"] if isinstance(info.get("question"), str) else asked.replace(IMAGE_TAG, "")
        reserved = RESERVED.search(question) or RESERVED.search(asked.replace(IMAGE_TAG, ""))
        if reserved:
            self.findings.add("D66", "FAIL", "a question holds text that stands for an image or a control token",
                              f"{where}: {reserved.group()}", "remove the text, or the row")  # fmt: skip
        if not asked.replace(IMAGE_TAG, "").strip():
            self.findings.add("D66", "FAIL", "a row has no question", where, "remove the row")
        answer = reward.get("ground_truth") if isinstance(reward, dict) else None
        if not isinstance(answer, str) or not answer.strip():
            self.findings.add("D66", "FAIL", "a row has no answer to compare with",
                              f"{where}, reward_model.ground_truth: got {answer!r}", "remove the row")  # fmt: skip
        return question

    def _images(self, images: list[Any], sizes: Any, where: str) -> list[bytes]:
        found, hashes = self.findings, []
        for i, image in enumerate(images):
            data = image.get("bytes") if isinstance(image, dict) else None
            if not data:
                found.add("D06", "FAIL", "an image is not in the row: verl opens its bytes, and never its path",
                          f"{where}, images[{i}]: got {str(image)[:80]}", "store the encoded bytes")  # fmt: skip
                continue
            hashes.append(digest(data))
            header = found.attempt(read_image, image, where, decode=False)
            self.figures.images += 1
            self.figures.formats[header.format if header else "unreadable"] += 1
            if header is None:
                continue
            told = sizes[i] if sizes and i < len(sizes) else None
            found.attempt(check_stored, header, told, where)
            if header.format not in FORMATS or header.frames != 1:
                found.add("D67", "FAIL", "an image is not JPEG, PNG or WEBP, or is animated",
                          f"{where}, images[{i}]: got {header.format}, {header.frames} frames", PREPARE)  # fmt: skip
        self._seen.update(hashes)
        return hashes

    def _apart(self, images: list[tuple[str, Any]], split: str, where: str) -> None:
        if split == "val":
            for image in images:
                self._held_out.setdefault(image, where)
            return
        for kind in ("name", "bytes"):
            shared = next((image for image in images if image[0] == kind and image in self._held_out), None)
            if shared:
                self.findings.add("D65", "FAIL", f"training and validation share an image, by {kind}",
                                  f"{where} and {self._held_out[shared]}", "split by image, as `sayo prepare` "
                                  "does")  # fmt: skip

    def _of_all_rows(self) -> None:
        figures, found = self.figures, self.findings
        rows = sum(figures.boxes_per_row.values())  # those whose boxes are right
        with_box = sum(n for boxes, n in figures.boxes_per_row.items() if boxes)
        if rows and not with_box:
            found.add("D04", "WARN", "no row has a box: methods that look at a region have nothing to reward",
                      f"{rows} rows", "add boxes, or set algorithm.adv_estimator=grpo")  # fmt: skip
        elif with_box < rows:
            found.add("D69", "INFO", "rows without a box, neutral for methods that look at a region",
                      f"{(rows - with_box) / rows:.1%} of the rows", "nothing, if so meant",
                      count=rows - with_box)  # fmt: skip
        whole = figures.whole_image_rows
        if whole:
            found.add("D69", "WARN" if whole > MANY * rows else "INFO",
                      "a box is the whole image: a region reward is then the same for every answer",
                      f"{whole / rows:.1%} of the rows", "leave such boxes out", count=whole)  # fmt: skip
