"""What drawn scenes show and ask: ``SceneConfig``.

Version 1 had the kinds of ``QUESTIONS`` and the fields up to ``region``. What came later leaves the hash, and with it
the name and the content of every folder of version 1, as it was: ``SceneConfig.content``.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from sayo_verl.data.prepared import content_hash
from sayo_verl.data.rows import PROMPTS
from sayo_verl.data.scenes.drawing import COLOURS, DIGIT_HEIGHT, SHAPES, chart_frame
from sayo_verl.errors import Rule, raise_first

# The kinds of version 1: kind -> text; {key} is the word that names the target. The tiny policy's words come from here.
QUESTIONS = {"colour": "What colour is the {key}?", "shape": "What shape is the {key} object?"}
OBJECT_KINDS = ("place", "size", "count", "relation")
BAR_KINDS = ("highest", "height", "higher")
KINDS = (*QUESTIONS, *OBJECT_KINDS, *BAR_KINDS)

GENERATOR_VERSION = 1
LATER_VERSION = 1  # of everything that version 1 of the generator does not draw: raise it when that changes
_VERSION_1_FIELDS = (
    "image_size",
    "grid",
    "min_objects",
    "max_objects",
    "min_radius",
    "max_radius",
    "question_kinds",
    "n_train",
    "n_val",
    "seed",
    "region",
)
# later field -> the kinds that read it; () stands for all
_READ_BY: dict[str, tuple[str, ...]] = {
    "repeat": ("place", "size", "relation"),
    "max_count": ("count",),
    "min_bars": BAR_KINDS,
    "max_bars": BAR_KINDS,
    "bar_levels": BAR_KINDS,
    "clutter": (),
    "noise": (),
    "prompt": (),
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
        question_kinds: any of ``"colour"`` (asked of a shape), ``"shape"`` (asked of a colour), ``"place"``,
            ``"size"``, ``"count"``, ``"relation"`` (see ``sayo_verl.data.scenes.kinds``) and, of bar charts,
            ``"highest"``, ``"height"``, ``"higher"`` (``sayo_verl.data.scenes.charts``).
        n_train, n_val: rows of the two files.
        seed: decides every scene; a row depends on the seed, its split and its index alone.
        region: whose boxes are rewarded, those of the objects that the question needs or (the wrong-box control) those
            of random other objects: as many, or all others where there are fewer.
        repeat: other objects that share the word that the question asks by: the shape (``"place"``), the colour or the
            shape (``"size"``, ``"relation"``). At 0 that word alone finds the object.
        max_count: largest answer of ``"count"``; the smallest is 1.
        min_bars, max_bars: bars of a chart, both inclusive.
        bar_levels: height of a chart's scale; bars are whole numbers from 1 to this high.
        clutter: short grey strokes on the background, that no question asks for; one that finds no room is left out.
        noise: standard deviation of the pixel noise, in levels of 255. A picture is known by its drawing without
            clutter and noise when train and held-out are kept apart.
        prompt: ``"question"`` is the bare question, which the tiny policy was warmed up to answer in the rewarded form.
            Other models need ``"instruction"`` or ``"released"``, as in ``sayo_verl.data.rows.PROMPTS``.
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
    prompt: Literal["question", "instruction", "released"] = "question"

    def __post_init__(self) -> None:
        kinds = set(self.question_kinds)
        rules = [self._rule(not kinds or not kinds <= set(KINDS), "question_kinds", f"some of {sorted(KINDS)}")]
        if kinds & {*QUESTIONS, *OBJECT_KINDS}:
            rules += self._object_rules(kinds)
        if kinds & set(BAR_KINDS):
            rules += self._bar_rules()
        unreadable = "height" in kinds and self.noise > 32
        rules += [
            self._rule(self.n_train < 1 or self.n_val < 1, "n_train, n_val", "at least 1"),
            self._rule(self.region not in ("target", "distractor"), "region", "'target' or 'distractor'"),
            self._rule(self.prompt not in ("question", *PROMPTS), "prompt", f"'question' or one of {PROMPTS}"),
            self._rule(not 0 <= self.clutter <= 64, "clutter", "0 to 64"),
            self._rule(not 0 <= self.noise <= 64, "noise", "0 to 64"),
            self._rule(unreadable, "noise, question_kinds", "at most 32, or no number can be read"),
        ]
        for name in self._changed():
            unread = bool(_READ_BY[name]) and not kinds & set(_READ_BY[name])
            wanted = f"a kind that reads {name}: {list(_READ_BY[name])}"
            rules.append(self._rule(unread, f"{name}, question_kinds", wanted))
        raise_first(rules)

    def _rule(self, broken: bool, names: str, wanted: str) -> Rule:
        """A rule about some fields, named as in ``"n_train, n_val"``."""
        got = ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split(", "))
        return Rule(
            "D20", broken, "no scene can be drawn", where="SceneConfig", got=got, wanted=wanted, fix=f"change {names}"
        )

    def _object_rules(self, kinds: set[str]) -> list[Rule]:
        """Rules of scenes on the grid."""
        fewest, most = 1, self.grid**2
        if kinds & set(QUESTIONS):
            most = min(most, len(SHAPES), len(COLOURS))
        if kinds & {"size", "count", "relation"}:
            fewest = 2
        if "relation" in kinds:  # of the cells on one side of the named object only one may be taken
            most = min(most, self.grid**2 - max(0, self.grid - 2))
        alike = bool(kinds & set(OBJECT_KINDS)) and self.min_radius < 3
        flat = bool(kinds & {"place", "relation"}) and self.grid < 2
        rules = [
            self._rule(self.grid < 1, "grid", "at least 1"),
            self._rule(
                not fewest <= self.min_objects <= self.max_objects <= most,
                "min_objects, max_objects",
                f"{fewest} to {most}, in order",
            ),
            self._rule(not 1 <= self.min_radius <= self.max_radius, "min_radius, max_radius", "at least 1, in order"),
            self._rule(
                2 * self.max_radius + 2 > self.image_size // max(1, self.grid),
                "max_radius",
                "an object that fits in its cell",
            ),
            self._rule(alike, "min_radius", "at least 3, or shapes look alike"),
            self._rule(flat, "grid", "at least 2, for a place or a relation"),
        ]
        if kinds & {"place", "size", "relation"}:
            others = self.min_objects - (2 if "relation" in kinds else 1)
            if "place" in kinds:  # none in the named quarter or on the lines that bound it
                others = min(others, self.grid**2 - (self.grid - self.grid // 2) ** 2)
            wrong = not 0 <= self.repeat <= others
            rules.append(self._rule(wrong, "repeat, min_objects", f"repeat from 0 to {others}"))
        if "size" in kinds:
            apart = self.max_radius - self.min_radius >= 2 and 4 * self.max_radius >= 5 * self.min_radius
            wanted = "sizes that differ by a quarter and 2 pixels or more"
            rules.append(self._rule(not apart, "min_radius, max_radius", wanted))
        if "count" in kinds:
            most = self.max_objects - 1
            wrong = not 1 <= self.max_count <= most
            rules.append(self._rule(wrong, "max_count, max_objects", f"max_count from 1 to {most}"))
        return rules

    def _bar_rules(self) -> list[Rule]:
        """Rules of charts."""
        levels = range(1, 100)
        rules = [self._rule(self.bar_levels not in levels, "bar_levels", "1 to 99")]
        if self.bar_levels in levels:
            frame = chart_frame(self.image_size, self.bar_levels)
            most = min(len(COLOURS), self.bar_levels, max(0, frame.width // _MIN_SLOT))
            rules += [
                self._rule(
                    frame.step < frame.scale * (DIGIT_HEIGHT + 1),
                    "bar_levels, image_size",
                    "a scale whose numbers do not touch",
                ),
                self._rule(
                    not 2 <= self.min_bars <= self.max_bars <= most,
                    "min_bars, max_bars, bar_levels, image_size",
                    f"2 to {most} bars, in order: as many as there are levels, colours and room",
                ),
            ]
        return rules

    def _changed(self) -> list[str]:
        """Fields that version 1 did not have and that are not at their default."""
        return [f.name for f in fields(self) if f.name in _READ_BY and getattr(self, f.name) != f.default]

    def content(self) -> dict[str, Any]:
        """The fields that say what is drawn: those of version 1, and later ones where they are not at their default.

        What version 1 could not draw also has ``later_version``. For hashes and manifests: a field that is added here
        must not rename folders that do not use it.
        """
        changed = self._changed()
        plain = {name: value for name, value in asdict(self).items() if name in (*_VERSION_1_FIELDS, *changed)}
        if changed or not is_version_1(self.question_kinds):
            plain["later_version"] = LATER_VERSION
        return plain

    def config_hash(self) -> str:
        """Ten hexadecimal digits; equal for equal content of the prepared folder."""
        return content_hash("scenes", GENERATOR_VERSION, self.content())


def is_version_1(kinds: Sequence[str]) -> bool:
    """Whether version 1 asked all these kinds: such scenes are drawn before their kind is chosen."""
    return set(kinds) <= set(QUESTIONS)


if set(_READ_BY) | set(_VERSION_1_FIELDS) != {f.name for f in fields(SceneConfig)}:
    raise AssertionError("a field of SceneConfig is neither of version 1 nor in _READ_BY")
