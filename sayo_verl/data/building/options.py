"""The options of every ``sayo prepare`` that builds rows from a source, and their flags.

Error code: D57 an option is out of range.
"""

import argparse
import dataclasses
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sayo_verl.data.boxes import FRAMES, BoxRules
from sayo_verl.data.building.shards import Layout
from sayo_verl.data.images import ImageRules
from sayo_verl.data.rows import INSTRUCTION, PROMPTS, RESERVED
from sayo_verl.errors import Rule, raise_first

# Reasons that count towards max_drop: what is wrong with images and text, not what the source does not choose.
LOSSES = frozenset(
    {
        "empty_question",
        "empty_answer",
        "ungradable_answer",
        "reserved_text",
        "image_missing",
        "image_empty",
        "image_unreadable",
        "image_format",
        "image_too_large",
        "image_too_small",
        "image_too_long",
    }
)
# Options that decide how the work is done, not what is in the folder
_FREE = ("workers", "max_drop", "allow_missing_images", "overwrite")
_HELP = {
    "limit": "random rows of the source; 0: all",
    "share": "share of the source that is drawn at random, before --limit; 1: all",
    "seed": "seed of the draw and of the split",
    "val_share": "share of images to hold out, at least one; 0: none",
    "workers": "processes that read images; 0: one for each core",
    "shard_rows": "rows of a shard",
    "row_group_rows": "rows of a row group",
    "row_group_bytes": "bytes of images in a row group",
    "max_drop": "share of the examples that may be lost to broken images or unusable text",
    "box_frame": "boxes were drawn on the file's pixels (raw) or on the picture turned by EXIF (upright)",
    "rescale": "boxes were drawn on resized copies: scale them by the annotated size",
    "keep_without_boxes": "keep rows without a box; methods that need one are neutral there",
    "instruction": "text below each question that asks for a form of the answer; '' for none",
    "prompt": "how the form of the answer is asked for: below the question, or in SAYO's released system turn",
    "allow_missing_images": "leave out and count rows whose images are missing, instead of stopping",
    "overwrite": "start over in a folder made of something else",
}


@dataclass(frozen=True)
class BuildOptions:
    """How rows are made.

    Attributes:
        limit: draw so many examples uniformly from the whole source; 0 takes all. Those with the smallest
            hash(seed, id) are drawn, whatever the order of the source.
        share: draw about this share of the examples: those with a hash(seed, id) below it. 1 takes all.
        seed: of the draw and of the split.
        val_share: share of the *images* whose rows are held out, in [0, 1). Above 0 at least one image is held out, if
            there are two or more.
        workers: processes that read images; 0: one for each core.
        shard_rows: rows of a shard.
        row_group_rows, row_group_bytes: a row group ends with so many rows, and before so many bytes of images.
        max_drop: share of the examples that may be lost before the build fails. Lost are those of ``LOSSES``: broken
            images and unusable text. What the source leaves out on purpose (no_object, ...), rows without boxes and
            duplicates are not. With ``limit``, the share is of the examples drawn.
        box_frame: "auto", "raw" or "upright", as ``boxes.place_boxes``.
        rescale: as ``boxes.place_boxes``.
        keep_without_boxes: keep rows that have no box or lose all of theirs.
        instruction: stands below each question, as ``rows.record``; "" for none.
        prompt: of ``rows.PROMPTS``; "released" leaves no room for an instruction.
        allow_missing_images: count missing images as lost instead of stopping at the first.
        overwrite: start over in a folder that was made of something else, or was damaged.
        image_rules, box_rules: which images and boxes are kept.
    """

    limit: int = 0
    share: float = 1.0
    seed: int = 0
    val_share: float = 0.01
    workers: int = 0
    shard_rows: int = Layout().shard_rows
    row_group_rows: int = Layout().row_group_rows
    row_group_bytes: int = Layout().row_group_bytes
    max_drop: float = 0.01
    box_frame: str = "auto"
    rescale: bool = False
    keep_without_boxes: bool = False
    instruction: str = INSTRUCTION
    allow_missing_images: bool = False
    overwrite: bool = False
    image_rules: ImageRules = field(default_factory=ImageRules)
    box_rules: BoxRules = field(default_factory=BoxRules)
    prompt: str = PROMPTS[0]

    def __post_init__(self) -> None:
        two_prompts = self.prompt == "released" and self.instruction not in (INSTRUCTION, "")
        reserved = RESERVED.search(self.instruction) is not None
        sizes = ("shard_rows", "row_group_rows", "row_group_bytes")
        raise_first(
            [
                self._rule(self.limit < 0, "limit", "0 (all) or more"),
                self._rule(self.workers < 0, "workers", "0 (one for each core) or more"),
                self._rule(not 0 < self.share <= 1, "share", "more than 0, at most 1"),
                self._rule(not 0 <= self.val_share < 1, "val_share", "at least 0, less than 1"),
                self._rule(not 0 <= self.max_drop <= 1, "max_drop", "0 to 1"),
                self._rule(reserved, "instruction", "text without image tags and control tokens"),
                self._rule(two_prompts, "instruction", "none with --prompt released"),
                self._rule(self.prompt not in PROMPTS, "prompt", ", ".join(PROMPTS)),
                self._rule(self.box_frame not in FRAMES, "box_frame", ", ".join(FRAMES)),
                *(self._rule(getattr(self, name) < 1, name, "1 or more") for name in sizes),
            ]
        )

    def _rule(self, broken: bool, name: str, wanted: str) -> Rule:
        return Rule(
            "D57",
            broken,
            "an option is out of range",
            where=f"--{name.replace('_', '-')}",
            got=getattr(self, name),
            wanted=wanted,
            fix="correct the option",
        )

    def deciding(self) -> dict[str, Any]:
        """The options that decide what is in the folder."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _FREE}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every ``sayo prepare`` that builds from a source, beside the source's own and ``--out``."""
    group = parser.add_argument_group("building")
    for option in dataclasses.fields(BuildOptions):
        flag, default = f"--{option.name.replace('_', '-')}", option.default
        if isinstance(default, bool):
            with suppress(argparse.ArgumentError):  # a source may have it, under the same name and meaning
                group.add_argument(flag, action="store_true", help=_HELP[option.name])
        elif option.name in _HELP:
            choices = {"box_frame": FRAMES, "prompt": PROMPTS}.get(option.name)
            group.add_argument(
                flag,
                type=type(default),
                default=default,
                choices=choices,
                metavar=None if choices else "N" if type(default) is int else "X" if type(default) is float else "TEXT",
                help=f"{_HELP[option.name]} (default: %(default)s)",
            )
    for prefix, plural, rules in (("image", "images", ImageRules), ("box", "boxes", BoxRules)):
        part = parser.add_argument_group(f"which {plural} are kept", f"see {rules.__name__} in {rules.__module__}")
        for option in dataclasses.fields(rules):
            part.add_argument(
                f"--{prefix}-{option.name.replace('_', '-')}",
                type=type(option.default),
                default=option.default,
                metavar="X",
                help="default: %(default)s",
            )


def options_from(args: argparse.Namespace) -> BuildOptions:
    """The options from the flags of ``add_flags``."""
    given = {
        option.name: getattr(args, option.name) for option in dataclasses.fields(BuildOptions) if option.name in _HELP
    }
    image, box = (
        {option.name: getattr(args, f"{prefix}_{option.name}") for option in dataclasses.fields(rules)}
        for prefix, rules in (("image", ImageRules), ("box", BoxRules))
    )
    return BuildOptions(**given, image_rules=ImageRules(**image), box_rules=BoxRules(**box))
