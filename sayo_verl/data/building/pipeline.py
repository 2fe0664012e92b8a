"""Images read, checked and stored, and boxes placed, in worker processes; results in the order of the examples.

Nothing here depends on what came before: whatever does is decided by ``build`` when the results arrive.
A worker imports neither torch nor the source's modules. At most ``2 * workers + 2`` chunks of ``CHUNK`` examples are in
hand at any time, which bounds memory: about ``2 * workers + 3`` times ``CHUNK`` encoded images in the main process, and
one decoded image in each worker.
"""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import connection
from typing import NamedTuple

from sayo_verl.data.boxes import Box, BoxRules, place_boxes
from sayo_verl.data.building.shards import bytes64
from sayo_verl.data.image_files import read_image
from sayo_verl.data.images import ImageRules, store_image
from sayo_verl.data.rows import Drop, Example, LeftOut
from sayo_verl.errors import SayoError

CHUNK = 8

Size = tuple[int, int]


class Rules(NamedTuple):
    """What decides how an example becomes a row; as ``build.BuildOptions``."""

    box_frame: str
    rescale: bool
    keep_without_boxes: bool
    images: ImageRules
    boxes: BoxRules


class Item(NamedTuple):
    """A record of the source.

    Attributes:
        ordinal: its place in the source.
        example: None where the source left it out.
        left_out: why it is left out without a look at its images, else None.
    """

    ordinal: int
    example: Example | None
    left_out: LeftOut | None


@dataclass
class Made:
    """What becomes of an example.

    Attributes:
        stored: per image, its bytes, width and height. Empty where the example is left out.
        boxes, names: per image, placed.
        sizes: per image, what its boxes were drawn on, as ``drawn_on`` tells.
        hashes: per image, 64 bits of the sha256 of its stored bytes.
        changed: what was done to images, one entry for each.
        boxes_left_out: reason -> boxes.
        reason, detail: why it is left out; "" where it is not.
        reached_boxes: its images are sound, so that its boxes were looked at.
    """

    stored: list[tuple[bytes, int, int]] = field(default_factory=list)
    boxes: list[Sequence[Box]] = field(default_factory=list)
    names: list[Sequence[str]] = field(default_factory=list)
    sizes: list[Size | None] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    boxes_left_out: Counter[str] = field(default_factory=Counter)
    reason: str = ""
    detail: str = ""
    reached_boxes: bool = False


def drawn_on(example: Example, stored: Sequence[Size], frame: str) -> list[Size | None]:
    """Per image, the size that its boxes were drawn on: the annotated one, or else the stored one.

    None where neither tells: in the raw frame, an image that is stored upright may have had its sides swapped.
    """
    annotated = example.sizes or [None] * len(stored)
    return [own or (None if frame == "raw" else size) for own, size in zip(annotated, stored, strict=True)]


def make(example: Example, rules: Rules) -> Made:
    """Everything about an example that costs time.

    Raises:
        SayoError: of ``read_image``, ``store_image`` and ``place_boxes``.
    """
    made = Made()
    names = [f"{example.data_source} {example.id}, image {ref.key!r}" for ref in example.images]
    try:
        stored = [
            store_image(read_image(ref), where=where, options=rules.images)
            for ref, where in zip(example.images, names, strict=True)
        ]
    except Drop as drop:
        made.reason, made.detail = drop.reason, drop.detail
        return made
    made.reached_boxes = True
    made.sizes = drawn_on(example, [(image.width, image.height) for image in stored], rules.box_frame)
    for image, where, boxes, box_names, annotated in zip(
        stored, names, example.boxes, example.box_names, example.sizes or [None] * len(stored), strict=True
    ):
        placed = place_boxes(
            boxes,
            box_names,
            box_format=example.box_format,
            frame=rules.box_frame,
            stored=image,
            annotated=annotated,
            rescale=rules.rescale,
            rules=rules.boxes,
            where=where,
        )
        made.boxes_left_out.update(placed.left_out)
        made.boxes.append(placed.boxes)
        made.names.append(placed.names)
    if not any(made.boxes) and not rules.keep_without_boxes:
        made.reason = "no_box"
        made.detail = ", ".join(f"{n} {reason}" for reason, n in sorted(made.boxes_left_out.items()))
        return made
    made.stored = [(image.data, image.width, image.height) for image in stored]
    made.hashes = [bytes64(image.data) for image in stored]
    made.changed = [", ".join(image.changed) for image in stored if image.changed]
    return made


def _make_all(examples: Sequence[Example], rules: Rules) -> list[Made]:
    return [make(example, rules) for example in examples]


def in_order(items: Iterator[Item], rules: Rules, workers: int) -> Generator[tuple[Item, Made | None], None, None]:
    """Items with what becomes of them, in their order; None where nothing had to be made. Close it when done.

    Args:
        items: read as far ahead as there is room.
        rules: how.
        workers: processes; with one, this process does the work itself.

    Raises:
        SayoError: D54 when a worker process dies, and what ``make`` raises.
    """
    if workers == 1:
        for item in items:
            yield item, make(item.example, rules) if item.example is not None and item.left_out is None else None
        return
    # spawn: a fork of a process that has threads, such as Arrow's, can hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        waiting: deque[tuple[list[Item], Future[list[Made]] | None]] = deque()
        try:
            while chunk := list(islice(items, CHUNK)):
                todo = [item.example for item in chunk if item.example is not None and item.left_out is None]
                waiting.append((chunk, pool.submit(_make_all, todo, rules) if todo else None))
                if len(waiting) > 2 * workers + 2:
                    yield from _results(*waiting.popleft())
            while waiting:
                yield from _results(*waiting.popleft())
        except BrokenProcessPool as error:
            raise SayoError(
                "D54",
                "a process that reads images died",
                where="worker process",
                got="killed for memory, or crashed on an image",
                fix="call again with fewer --workers, it goes on; with --workers 1 the crash shows itself",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _results(chunk: list[Item], future: "Future[list[Made]] | None") -> Iterator[tuple[Item, Made | None]]:
    made = iter(future.result() if future is not None else ())
    for item in chunk:
        yield item, next(made) if item.example is not None and item.left_out is None else None


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # a worker of a process that was killed would wait for work forever
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
