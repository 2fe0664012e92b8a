"""Walks over drawn grids of arrows (``sayo_verl.scenes.walk``) as a source.

The training rows and a first kind of validation rows have walks of the same make. Two more kinds of validation rows
have longer walks, and arrows on the path in colours that their direction never has in training. Each kind has a data
source of its own, so that verl's validation metrics are kept apart.
"""

import hashlib
import io
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from datasets import List, Value

from sayo_verl.data.rows import Example, ImageRef, Source
from sayo_verl.errors import SayoError
from sayo_verl.reward.walk import WALK_SOURCES
from sayo_verl.scenes.walk import Walk, WalkConfig, sample_walk
from sayo_verl.scenes.walk_truth import DIRECTIONS, cell_names

_MAX_REDRAWS = 100


@dataclass(frozen=True)
class WalkSource(Source):
    """The walks of a configuration. No question about the same arrows occurs twice."""

    config: WalkConfig
    name: str = "walks"
    extra_features = {  # noqa: RUF012
        "walk": {
            **{name: Value("int64") for name in ("grid", "start", "steps")},
            **{name: List(Value("int64")) for name in ("directions", "moves")},
        }
    }

    def facts(self) -> dict[str, Any]:
        return {"config": asdict(self.config)}

    def examples(self) -> Iterator[Example]:
        """Validation walks, then training walks; noise does not make another walk.

        Raises:
            SayoError: D82 for too few different walks.
        """
        config, (alike, more_steps, new_pairs) = self.config, WALK_SOURCES
        seen = set[tuple[Any, ...]]()
        for source, split, rows in (
            (alike, "val", config.n_val),
            (more_steps, "val", config.n_val if config.more_steps else 0),
            (new_pairs, "val", config.n_val if config.held_out_pairs and config.moves == "image" else 0),
            (alike, "train", config.n_train),
        ):
            kind = source.rpartition("/")[2]
            for index in range(rows):
                name = f"{kind}-{split}-{index}"
                walk = self._walk(name, seen, longer=source == more_steps, new_pairs=source == new_pairs)
                yield self._example(walk, name, source, split)

    def _walk(self, name: str, seen: set[tuple[Any, ...]], *, longer: bool, new_pairs: bool) -> Walk:
        """The walk of a row, unlike those of the rows before it."""
        for attempt in range(_MAX_REDRAWS):
            rng = random.Random(f"{self.config.seed}/{name}/{attempt}")
            walk = sample_walk(rng, self.config, longer=longer, new_pairs=new_pairs)
            shown = (walk.question,) if walk.moves else (walk.question, walk.directions, walk.colours)
            if shown not in seen:
                seen.add(shown)
                return walk
        what, fix = "the configuration allows too few different walks", "allow more steps, or ask for fewer rows"
        raise SayoError("D82", what, where=f"row {name}", fix=fix)

    def _example(self, walk: Walk, name: str, source: str, split: str) -> Example:
        images: tuple[ImageRef, ...] = ()
        if walk.image is not None:
            png = io.BytesIO()
            walk.image.save(png, format="PNG")
            images = (ImageRef(hashlib.sha256(png.getvalue()).hexdigest()[:20], data=png.getvalue()),)
        cells = cell_names(walk.grid)
        looks = tuple(f"{cells[cell]} {DIRECTIONS[walk.directions[cell]]}" for cell in walk.path[:-1])
        return Example(
            id=name,
            images=images,
            question=walk.question,
            answer=walk.answer,
            boxes=(walk.boxes,) if images else (),
            box_names=(looks,) if images else (),
            box_format="xyxy",
            box_source="walk_cells" if images else "none",
            data_source=source,
            sizes=(walk.image.size,) if walk.image is not None else (),
            kind="walk",
            split=split,
            neutral=not images,
            extra={
                "walk": {
                    "grid": walk.grid,
                    "start": walk.start,
                    "directions": list(walk.directions),
                    "steps": walk.steps,
                    "moves": list(walk.moves),
                }
            },
        )
