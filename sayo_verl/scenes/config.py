"""What drawn scenes show and ask: ``SceneConfig``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sayo_verl.errors import SayoError
from sayo_verl.scenes.drawing import COLOURS, DIGIT_HEIGHT, SHAPES, chart_frame

# kind -> text; {key} is the word that names the target. The tiny policy's words come from here.
QUESTIONS = {"colour": "What colour is the {key}?", "shape": "What shape is the {key} object?"}
BAR_KINDS = ("highest", "height", "higher")
KINDS = (*QUESTIONS, "place", "size", "count", "relation", *BAR_KINDS)
# field -> the kinds that read it; the other fields are read by all kinds, or by all on the grid
READ_BY = {"repeat": ("place", "size", "relation"), "max_count": ("count",)}
READ_BY |= dict.fromkeys(("min_bars", "max_bars", "bar_levels"), BAR_KINDS)
_MIN_SLOT = 6  # pixels of a chart's width for one bar and the gap beside it
_Rules = Iterator[tuple[str, bool, str]]  # fields, whether they fit, what fits; a rule may rely on those before it


@dataclass(frozen=True)
class SceneConfig:
    """What is drawn and asked. Ranges include both ends.

    Attributes:
        image_size: side of the square image, in pixels.
        grid: cells per side; one object fits in a cell.
        min_objects, max_objects: objects per scene; not read by charts.
        min_radius, max_radius: half the side of an object's box, in pixels. For ``"size"``, that of small and of large
            objects: the closer, the harder.
        question_kinds: of ``KINDS``; ``sayo_verl.scenes.kinds`` describes them.
        n_train, n_val, seed: rows of the splits; a scene depends on the seed, its split and its index alone.
        region: whose boxes are rewarded, those of the objects that the question needs or (the wrong-box control) those
            of random other objects: as many, or all others where there are fewer.
        repeat: other objects that share the word that the question asks by: the shape (``"place"``), the colour or the
            shape (``"size"``, ``"relation"``). At 0 that word alone finds the object.
        max_count: largest answer of ``"count"``; the smallest is 1.
        min_bars, max_bars, bar_levels: bars of a chart, and the height of its scale.
        clutter, noise: grey strokes on the background, if there is room; deviation of the noise, in levels of 255.
    """

    image_size: int = 96
    grid: int = 3
    min_objects: int = 5
    max_objects: int = 6
    min_radius: int = 10
    max_radius: int = 14
    question_kinds: tuple[str, ...] = ("colour", "shape")
    n_train: int = 4096
    n_val: int = 256
    seed: int = 0
    region: Literal["target", "distractor"] = "target"
    repeat: int = 1
    max_count: int = 4
    min_bars: int = 3
    max_bars: int = 5
    bar_levels: int = 6
    clutter: int = 0
    noise: int = 0

    def __post_init__(self) -> None:
        for names, fits, wanted in self._rules():
            if not fits:
                got = ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split(", "))
                what, where, fix = "no scene can be drawn", "SceneConfig", f"change {names}"
                raise SayoError("D20", what, where=where, got=got, wanted=wanted, fix=fix)

    def _rules(self) -> _Rules:
        kinds = set(self.question_kinds)
        yield "question_kinds", bool(kinds) and kinds <= set(KINDS), f"some of {sorted(KINDS)}"
        yield "n_train, n_val", min(self.n_train, self.n_val) >= 1, "at least 1"
        yield "region", self.region in ("target", "distractor"), "'target' or 'distractor'"
        yield "clutter", 0 <= self.clutter <= 64, "0 to 64"
        yield "noise", 0 <= self.noise <= (32 if "height" in kinds else 64), "0 to 64, with numbers to read 0 to 32"
        for name, readers in READ_BY.items():
            read = getattr(self, name) == getattr(SceneConfig, name) or not kinds.isdisjoint(readers)
            yield f"{name}, question_kinds", read, f"a kind that reads {name}: {list(readers)}"
        if kinds - set(BAR_KINDS):
            yield from self._grid_rules(kinds)
        if kinds & set(BAR_KINDS):
            yield "bar_levels", 1 <= self.bar_levels <= 99, "1 to 99"
            frame = chart_frame(self.image_size, self.bar_levels)
            legible = frame.step >= frame.scale * (DIGIT_HEIGHT + 1)
            yield "bar_levels, image_size", legible, "a scale whose numbers do not touch"
            most = min(len(COLOURS), self.bar_levels, max(0, frame.width // _MIN_SLOT))
            wanted = f"2 to {most} bars, in order: as many as there are levels, colours and room"
            yield "min_bars, max_bars, bar_levels", 2 <= self.min_bars <= self.max_bars <= most, wanted

    def _grid_rules(self, kinds: set[str]) -> _Rules:
        yield "grid", self.grid >= (2 if kinds & {"place", "relation"} else 1), "at least 1, for a place or relation 2"
        cells, least = self.grid**2, 2 if kinds & {"size", "count", "relation"} else 1
        most = min(cells, len(SHAPES), len(COLOURS)) if kinds & set(QUESTIONS) else cells
        if "relation" in kinds:  # of the cells on one side of the named object only one may be taken
            most = min(most, cells - max(0, self.grid - 2))
        in_order = least <= self.min_objects <= self.max_objects <= most
        yield "min_objects, max_objects", in_order, f"{least} to {most}, in order"
        least = 3 if kinds - {*QUESTIONS, *BAR_KINDS} else 1  # smaller shapes look alike
        most = self.image_size // self.grid // 2 - 1  # an object fits in its cell
        in_order = least <= self.min_radius <= self.max_radius <= most
        yield "min_radius, max_radius", in_order, f"{least} to {most}, in order"
        if kinds & set(READ_BY["repeat"]):
            others = self.min_objects - (2 if "relation" in kinds else 1)
            if "place" in kinds:  # none in the named quarter or on the lines that bound it
                others = min(others, cells - (self.grid - self.grid // 2) ** 2)
            yield "repeat, min_objects", 0 <= self.repeat <= others, f"repeat from 0 to {others}"
        if "size" in kinds:
            apart = self.max_radius - self.min_radius >= 2 and 4 * self.max_radius >= 5 * self.min_radius
            yield "min_radius, max_radius", apart, "sizes that differ by a quarter and 2 pixels or more"
        if "count" in kinds:
            most = self.max_objects - 1
            yield "max_count, max_objects", 1 <= self.max_count <= most, f"max_count from 1 to {most}"
