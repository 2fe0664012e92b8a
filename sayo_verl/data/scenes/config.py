"""What drawn scenes show and ask: ``SceneConfig``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sayo_verl.data.scenes.drawing import COLOURS, DIGIT_HEIGHT, SHAPES, chart_frame
from sayo_verl.errors import Rule, raise_first

# kind -> text; {key} is the word that names the target. The tiny policy's words come from here.
QUESTIONS = {"colour": "What colour is the {key}?", "shape": "What shape is the {key} object?"}
BAR_KINDS = ("highest", "height", "higher")
KINDS = (*QUESTIONS, "place", "size", "count", "relation", *BAR_KINDS)
# field -> the kinds that read it; the other fields are read by all, or by all that draw on the grid
READ_BY = {
    "repeat": ("place", "size", "relation"),
    "max_count": ("count",),
    "min_bars": BAR_KINDS,
    "max_bars": BAR_KINDS,
    "bar_levels": BAR_KINDS,
}
_MIN_SLOT = 6  # pixels of a chart's width for one bar and the gap beside it


@dataclass(frozen=True)
class SceneConfig:
    """What is drawn and asked.

    Attributes:
        image_size: side of the square image, in pixels.
        grid: cells per side; one object fits in a cell.
        min_objects, max_objects: objects per scene, both inclusive; not read by charts.
        min_radius, max_radius: half the side of an object's box, in pixels, both inclusive. In scenes of kind
            ``"size"`` small objects have the one and large ones the other: the closer, the harder.
        question_kinds: of ``KINDS``; ``sayo_verl.data.scenes.kinds`` describes them.
        n_train, n_val: rows of the two splits.
        seed: decides every scene; a row depends on the seed, its split and its index alone.
        region: whose boxes are rewarded, those of the objects that the question needs or (the wrong-box control) those
            of random other objects: as many, or all others where there are fewer.
        repeat: other objects that share the word that the question asks by: the shape (``"place"``), the colour or the
            shape (``"size"``, ``"relation"``). At 0 that word alone finds the object.
        max_count: largest answer of ``"count"``; the smallest is 1.
        min_bars, max_bars: bars of a chart, both inclusive.
        bar_levels: height of a chart's scale; bars are whole numbers from 1 to this high.
        clutter: short grey strokes on the background, that no question asks for; one that finds no room is left out.
        noise: standard deviation of the pixel noise, in levels of 255.
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
        what, where = "no scene can be drawn", "SceneConfig"
        raise_first(
            Rule("D20", not fits, what, where=where, got=self._values(names), wanted=wanted, fix=f"change {names}")
            for names, fits, wanted in self._rules()
        )

    def _values(self, names: str) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split(", "))

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """(fields, whether they fit, what fits); a rule may rely on those before it."""
        kinds = set(self.question_kinds)
        yield "question_kinds", bool(kinds) and kinds <= set(KINDS), f"some of {sorted(KINDS)}"
        yield "n_train, n_val", min(self.n_train, self.n_val) >= 1, "at least 1"
        yield "region", self.region in ("target", "distractor"), "'target' or 'distractor'"
        yield "clutter", 0 <= self.clutter <= 64, "0 to 64"
        yield "noise", 0 <= self.noise <= 64, "0 to 64"
        yield "noise, question_kinds", "height" not in kinds or self.noise <= 32, "at most 32, or no number is legible"
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
            yield (
                "min_bars, max_bars, bar_levels, image_size",
                2 <= self.min_bars <= self.max_bars <= most,
                f"2 to {most} bars, in order: as many as there are levels, colours and room",
            )

    def _grid_rules(self, kinds: set[str]) -> Iterator[tuple[str, bool, str]]:
        """Rules of objects on the grid."""
        yield "grid", self.grid >= 1, "at least 1"
        cells = self.grid**2
        fewest = 2 if kinds & {"size", "count", "relation"} else 1
        most = min(cells, len(SHAPES), len(COLOURS)) if kinds & set(QUESTIONS) else cells
        if "relation" in kinds:  # of the cells on one side of the named object only one may be taken
            most = min(most, cells - max(0, self.grid - 2))
        in_order = fewest <= self.min_objects <= self.max_objects <= most
        yield "min_objects, max_objects", in_order, f"{fewest} to {most}, in order"
        yield "min_radius, max_radius", 1 <= self.min_radius <= self.max_radius, "at least 1, in order"
        room = self.image_size // self.grid >= 2 * self.max_radius + 2
        yield "max_radius", room, "an object that fits in its cell"
        yield "min_radius", self.min_radius >= 3 or kinds <= set(QUESTIONS), "at least 3, or shapes look alike"
        yield "grid", self.grid >= 2 or not kinds & {"place", "relation"}, "at least 2, for a place or a relation"
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
