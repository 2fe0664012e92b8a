"""Examples of a source to a folder of verl parquet: images stored, boxes placed, everything counted, nothing repeated.

The source is streamed, twice where ``limit`` draws from it, and never held. Images are read in worker processes, and
rows are written in the source's order, so that the folder is the same, byte for byte, whatever the number of workers
and however often the work was interrupted (``sayo_verl.data.building.output``).

The split is by picture: a hash of the seed and of the row's first image key in alphabetical order says train or val.
Where ``val_share`` of few images would hold out none, the image of the smallest hash is held out.
A key in both splits, which only rows of several images can bring about, stops the work. A picture in both splits under
two keys, found by its bytes, does not: of its rows those are left out that come later and are in the other split.

Memory: 12 to 24 bytes for each id, question, image key and image, beside a row group of each split and what the
workers have in hand.

Error codes: D52 the source contradicts itself, D53 the folder is of something else, D54 images cannot be had, D55 too
much is lost, D56 the folder is damaged, D57 an option is out of range.
"""

import heapq
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

from sayo_verl.data.building.folder import IN_OTHER_SPLIT, LEFT_OUT, Built, check_folder
from sayo_verl.data.building.meter import Meter, finished
from sayo_verl.data.building.options import LOSSES, BuildOptions, add_flags, options_from
from sayo_verl.data.building.output import Earlier, Output
from sayo_verl.data.building.pipeline import Item, Made, Rules, Size, drawn_on, in_order
from sayo_verl.data.building.shards import SPLITS, START_OVER, Hashes, Layout, bytes64, hash64
from sayo_verl.data.contract import check_data_source
from sayo_verl.data.mixups import FormatWatch
from sayo_verl.data.rows import Drop, Example, LeftOut, Source, check_text, record
from sayo_verl.errors import SayoError

__all__ = ["BuildOptions", "Built", "add_flags", "build", "check_folder", "options_from"]

ENOUGH_TO_TELL = 1000  # examples after which a build stops that has lost most of them
SHOWN = 5  # missing images that are named
LOOK_ON = 200  # records that are looked at for more of them


def build(source: Source, out: Path, options: BuildOptions) -> Built:
    """Make the folder, go on with it where it was begun, or take it as it is where it is finished.

    Args:
        source: where the examples come from.
        out: the folder.
        options: how.

    Raises:
        SayoError: D52-D57 as the module says, D42-D46 for boxes, and whatever the source refuses.
        KeyboardInterrupt: at Ctrl-C. The folder can be gone on with.
    """
    layout = Layout(options.shard_rows, options.row_group_rows, options.row_group_bytes)
    described = {"name": source.name, "facts": source.facts()}
    output = Output(out, described, options.deciding(), layout, overwrite=options.overwrite)
    meter = Meter(f"sayo prepare {source.name}", options.limit or None)
    return finished(output, meter, lambda: _Build(source, output, options, meter).run())


Results = Iterator[tuple[Item, Made | None]]


class _Build:
    """One pass over a source."""

    def __init__(self, source: Source, output: Output, options: BuildOptions, meter: Meter) -> None:
        self.source, self.output, self.options, self.meter = source, output, options, meter
        self.watches: dict[str, FormatWatch] = {}
        self.asked, self.keys, self.pictures = Hashes(), Hashes(), Hashes()
        self._drawn = self._draw() if options.limit else None
        self._held_below = self._hold_out_one() if options.val_share else 0.0

    def run(self) -> None:
        workers = self.options.workers or len(os.sched_getaffinity(0))
        rules = Rules(
            self.options.box_frame,
            self.options.rescale,
            self.options.keep_without_boxes,
            self.options.image_rules,
            self.options.box_rules,
        )
        with closing(in_order(self._to_do(), rules, workers)) as results:
            for item, made in results:
                self._look_for_missing(item, made, results)
                self._commit(item, made)
        for watch in self.watches.values():
            watch.finish()
        self.output.close_shards()
        self._check_losses(at_end=True)
        if not self.output.rows("train"):
            raise SayoError(
                "D55",
                "no row is left",
                where=str(self.output.folder),
                got=dict(self.output.counts["left_out"]) or "a source without examples",
                wanted="rows in train",
                fix=f"see {LEFT_OUT} for what became of each",
            )
        self.output.finish()
        for watch in self.watches.values():
            self.meter.say(watch.summary())

    # ------------------------------------------------------------------------------------------- what is to be done

    def _numbered(self) -> Iterator[tuple[int, Example | LeftOut]]:
        """The records of the source, whose ids must differ."""
        ids = Hashes()
        for ordinal, thing in enumerate(self.source.examples()):
            if not ids.add(hash64(thing.id)):
                raise SayoError(
                    "D52",
                    "two records of the source have one id",
                    where=f"{self.source.name} {thing.id}",
                    got=f"record {ordinal} and an earlier one",
                    wanted="ids that differ",
                    fix="name every record once; a file may have been given twice",
                )
            yield ordinal, thing

    def _luck(self, example: Example) -> float:
        """In [0, 1), by the seed and the id alone."""
        return hash64(f"draw {self.options.seed}", example.id) / 2**64

    def _draw(self) -> set[int]:
        """The ``limit`` examples with the smallest hash."""
        share = self.options.share
        ranked = (
            (self._luck(thing), ordinal)
            for ordinal, thing in self._numbered()
            if isinstance(thing, Example) and self._luck(thing) < share
        )
        return {ordinal for _, ordinal in heapq.nsmallest(self.options.limit, ranked)}

    def _items(self) -> Iterator[Item]:
        for ordinal, thing in self._numbered():
            if isinstance(thing, LeftOut):
                yield Item(ordinal, None, thing)
            elif ordinal in self._drawn if self._drawn is not None else self._luck(thing) < self.options.share:
                where = f"{self.source.name} {thing.id}"
                check_data_source(thing.data_source, where)
                if not thing.images:
                    raise SayoError("D52", "an example has no image", where=where, fix="leave it out")
                try:
                    check_text(thing.question, thing.answer)
                    yield Item(ordinal, thing, None)
                except Drop as drop:
                    yield Item(ordinal, thing, LeftOut(thing.id, drop.reason, drop.detail))

    def _to_do(self) -> Iterator[Item]:
        """What is not in the folder yet. What is there is compared with the source on the way, and remembered."""
        there = Earlier(self.output) if self.output.consumed else None
        for item in self._items():
            if there is not None and item.ordinal >= self.output.consumed:
                there.check_end()
                there = None
            if there is None:
                yield item
            elif item.ordinal in self.output.pending:
                there.open_row(item.ordinal, _id(item))
                yield item
            else:
                self._recall(item, there)
        if there is not None:
            there.check_end()

    def _recall(self, item: Item, there: Earlier) -> None:
        example = item.example
        row = there.row(self._split(example), example.id) if example is not None and item.left_out is None else None
        if example is not None and row is not None:
            stored = [(size[0], size[1]) for size in row["extra_info"]["image_size_wh"]]
            self._watch(example, drawn_on(example, stored, self.options.box_frame))
            self._remember(example, [bytes64(image["bytes"]) for image in row["images"]])
            return
        line = there.left_out(_id(item))
        if example is not None and "sizes" in line:
            self._watch(example, [None if size is None else (size[0], size[1]) for size in line["sizes"]])

    # ---------------------------------------------------------------------------------------------- what became of it

    def _look_for_missing(self, item: Item, made: Made | None, results: Results) -> None:
        """Stop at a missing image, after a look for a few more of them."""
        found = [_missing(item, made)]
        if self.options.allow_missing_images or not found[0]:
            return
        for later in islice(results, LOOK_ON):
            found += filter(None, [_missing(*later)])
            if len(found) == SHOWN:
                break
        raise SayoError(
            "D54",
            "images are missing",
            where=f"{self.source.name} {found[0]}",
            got="; ".join(found),
            wanted="every image that a row names",
            fix="correct the folder of images, or add the missing ones, and call the command again; it resumes. Or "
            "leave such rows out with --allow-missing-images",
        )

    def _commit(self, item: Item, made: Made | None) -> None:
        """Write or leave out one record; everything that depends on earlier records is decided here, in order."""
        again = item.ordinal in self.output.pending and item.ordinal < self.output.consumed
        if item.example is None or made is None:
            assert item.left_out is not None
            counted = item.example is not None or not (self.options.limit or self.options.share < 1)
            self._leave_out(item, item.left_out.reason, item.left_out.detail, counted=counted)
            return
        example, counts = item.example, self.output.counts
        if made.reached_boxes:
            self._watch(example, made.sizes)
        split, reason, detail = self._split(example), made.reason, made.detail
        if not reason and not again:
            self._check_keys(example, split)
            if _asked(example) in self.asked:
                reason = "duplicate"
            elif any(_tag(h, split, other=True) in self.pictures for h in made.hashes):
                reason = IN_OTHER_SPLIT
        if reason and again:
            raise SayoError(
                "D53",
                "an image changed since the folder was begun",
                where=f"{self.source.name} {example.id}",
                got=f"{reason} {detail}",
                wanted="a row",
                fix=START_OVER,
            )
        if not again:
            counts["boxes_left_out"].update(made.boxes_left_out)
        if reason:
            self._leave_out(item, reason, detail, sizes=made.sizes)
            return
        self._remember(example, made.hashes)
        n_boxes = sum(map(len, made.boxes))
        if not again:
            counts["images"].update(made.changed)
            counts["tally"].update(examples=1, boxes=n_boxes, without_boxes=not n_boxes)
        index = self.output.rows(split)
        self.output.add(
            record(
                example,
                stored=made.stored,
                boxes=made.boxes,
                box_names=made.names,
                split=split,
                index=index,
                instruction=self.options.instruction,
                prompt=self.options.prompt,
            ),
            item.ordinal,
        )
        self._used(item, again)

    def _leave_out(
        self, item: Item, reason: str, detail: str, *, counted: bool = True, sizes: Sequence[Size | None] = ()
    ) -> None:
        self.output.leave_out(_id(item), reason, detail, **({"sizes": sizes} if sizes else {}))
        tally = self.output.counts["tally"]
        tally["examples"] += item.example is not None or (counted and reason in LOSSES)
        tally["lost"] += counted and reason in LOSSES
        self._used(item, False)
        self._check_losses(at_end=False)

    def _used(self, item: Item, again: bool) -> None:
        if not again:
            self.output.used(item.ordinal)
        counts = self.output.counts
        self.meter.show(
            counts["tally"]["examples"], sum(self.output.rows(split) for split in SPLITS), counts["left_out"].total()
        )

    def _check_losses(self, *, at_end: bool) -> None:
        tally = self.output.counts["tally"]
        lost, examples = tally["lost"], tally["examples"]
        allowed = self.options.max_drop if at_end else max(self.options.max_drop, 0.5)
        if lost > allowed * examples and (at_end or examples >= ENOUGH_TO_TELL):
            reasons = {r: n for r, n in self.output.counts["left_out"].most_common() if r in LOSSES}
            raise SayoError(
                "D55",
                "too many examples are lost",
                where=str(self.output.folder / LEFT_OUT),
                got=f"{lost} of {examples}: {reasons}",
                wanted=f"at most {self.options.max_drop:.2%}",
                fix="look at the rows that were left out; if they are unusable indeed, raise --max-drop and call the "
                "command again; it resumes",
            )

    def _split_number(self, example: Example) -> float:
        """In [0, 1), by the seed and the image alone."""
        return hash64(f"split {self.options.seed}", min(image.key for image in example.images)) / 2**64

    def _hold_out_one(self) -> float:
        """Images with a smaller split number are held out: ``val_share``, or more if few images would give none.

        The source is read until one image is below ``val_share``: about 1 / val_share examples.
        """
        share, numbers = self.options.val_share, set[float]()
        for item in self._items():
            if item.example is not None and item.left_out is None:
                number = self._split_number(item.example)
                if number < share:
                    return share
                numbers.add(number)
        if len(numbers) < 2:  # none would be left to train on
            return share
        self.meter.say(f"--val-share {share:g} of {len(numbers)} images is less than one image: one is held out")
        return sorted(numbers)[1]

    def _split(self, example: Example) -> str:
        return "val" if self._split_number(example) < self._held_below else "train"

    def _check_keys(self, example: Example, split: str) -> None:
        for image in example.images:
            if _tag(hash64("key", image.key), split, other=True) in self.keys:
                raise SayoError(
                    "D52",
                    "an image is in train and in val",
                    where=f"{self.source.name} {example.id}",
                    got=f"image {image.key!r} together with {[i.key for i in example.images]}",
                    wanted="rows of several images that share none with rows of other splits",
                    fix="set --val-share=0 and hold rows out by hand, or give them one key",
                )

    def _remember(self, example: Example, hashes: Sequence[int]) -> None:
        split = self._split(example)
        self.asked.add(_asked(example))
        for image in example.images:
            self.keys.add(_tag(hash64("key", image.key), split))
        for value in hashes:
            self.pictures.add(_tag(value, split))

    def _watch(self, example: Example, sizes: Sequence[Size | None]) -> None:
        if example.box_format not in self.watches:
            self.watches[example.box_format] = FormatWatch(example.box_format)
        self.watches[example.box_format].add(example.boxes, sizes, f"{self.source.name} {example.id}")


def _id(item: Item) -> str:
    found = item.example or item.left_out
    assert found is not None
    return found.id


def _missing(item: Item, made: Made | None) -> str:
    """What is missing, or ""."""
    found = made if made is not None else item.left_out
    return f"{_id(item)}: {found.detail}" if found is not None and found.reason == "image_missing" else ""


def _asked(example: Example) -> int:
    """The question about the images."""
    return hash64("asked", " ".join(example.question.split()), *(image.key for image in example.images))


def _tag(value: int, split: str, *, other: bool = False) -> int:
    """A hash with the split in its last bit."""
    return value & ~1 | int((split == "val") != other)
