"""Drawn scenes with questions and exact boxes (``sayo_verl.scenes``) as a source, and their folders."""

import hashlib
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import List, Value
from PIL import Image

from sayo_verl.data.build import BuildOptions, build
from sayo_verl.data.folder import Prepared, check_folder, content_hash
from sayo_verl.data.rows import Example, ImageRef, Source
from sayo_verl.errors import SayoError
from sayo_verl.scenes import Scene, SceneConfig, sample_scene
from sayo_verl.scenes.config import BAR_KINDS

_MAX_REDRAWS = 100
_BOXES = List(List(List(Value("float64"))))


@dataclass(frozen=True)
class SceneSource(Source):
    """The scenes of a configuration. A row depends on the seed, its split and its index alone."""

    config: SceneConfig
    name: str = "scenes"
    extra_features = {"key_word": Value("string"), "target_boxes": _BOXES, "distractor_boxes": _BOXES}  # noqa: RUF012

    def facts(self) -> dict[str, Any]:
        return {"config": asdict(self.config)}

    def examples(self) -> Iterator[Example]:
        """Validation scenes, then training scenes of other drawings; noise does not make another drawing.

        Raises:
            SayoError: D21 where no object is left for the wrong-box control, D22 for too few different drawings.
        """
        held_out = set[bytes]()
        for split, rows in (("val", self.config.n_val), ("train", self.config.n_train)):
            for index in range(rows):
                scene, drawing = self._scene(split, index, held_out)
                if split == "val":
                    held_out.add(drawing)
                yield self._example(scene, split, index)

    def _scene(self, split: str, index: int, held_out: set[bytes]) -> tuple[Scene, bytes]:
        """A scene and the hash of its drawing; a training scene is drawn again if its drawing is held out."""
        for attempt in range(_MAX_REDRAWS):
            scene = sample_scene(random.Random(f"{self.config.seed}/{split}/{index}/{attempt}"), self.config)
            drawing = hashlib.sha256(scene.drawing.tobytes()).digest()
            if split == "val" or drawing not in held_out:
                return scene, drawing
        what, fix = "the configuration allows too few different images", "allow more objects, or ask for fewer rows"
        raise SayoError("D22", what, where=f"row {index} of {split}", fix=fix)

    def _example(self, scene: Scene, split: str, index: int) -> Example:
        if not scene.distractors:
            field = "min_bars" if scene.kind in BAR_KINDS else "min_objects"
            raise SayoError(
                "D21",
                "a row needs a further object, for the wrong-box control",
                where=f"SceneConfig.{field}, {scene.kind}",
                got=len(scene.objects),
                wanted=f"at least {len(scene.needed) + 1}",
                fix=f"set {field} to {len(scene.needed) + 1} or more",
            )
        png, picture = io.BytesIO(), Image.fromarray(scene.image)
        picture.save(png, format="PNG")
        rewarded = scene.needed if self.config.region == "target" else scene.distractors

        def shares(objects: Sequence[int]) -> list[list[list[float]]]:
            return [[[value / picture.width for value in scene.objects[i].box] for i in objects]]

        return Example(
            id=f"{split}-{index}",
            images=(ImageRef(hashlib.sha256(png.getvalue()).hexdigest()[:20], data=png.getvalue()),),
            question=scene.question,
            answer=scene.answer,
            boxes=(tuple(scene.objects[i].box for i in rewarded),),
            box_names=(tuple(scene.objects[i].name for i in rewarded),),
            box_format="xyxy",
            box_source=f"scene_{self.config.region}",
            data_source="sayo/scenes",
            sizes=(picture.size,),
            kind=scene.kind,
            split=split,
            extra={
                "key_word": scene.key_word(scene.target),
                "target_boxes": shares(scene.needed),
                "distractor_boxes": shares(scene.distractors),
            },
        )


def prepare(out_root: Path | str, config: SceneConfig, prompt: str = "question") -> Prepared:
    """``out_root/scenes-<hash>/``, built unless it is there. ``prompt``: as ``rows.messages_of``."""
    folder = Path(out_root) / f"scenes-{content_hash(asdict(config), prompt)}"
    try:
        check_folder(folder)
    except SayoError:  # it is not there, or not complete
        build(SceneSource(config), folder, BuildOptions(prompt=prompt, trust_boxes=True, overwrite=True))
        return Prepared(folder, False)
    return Prepared(folder, True)
