"""A row as the model receives it: the model's own processor, called as verl calls it.

torch, transformers and verl are imported when a model is loaded, not with this module.

Shape suffixes: S tokens of the prompt, N boxes, V visual tokens of one image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sayo_verl.errors import SayoError
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import box_masks

# What templates, image readers and processors of other packages raise for a row that they cannot process
_REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError, OSError)


@dataclass(frozen=True)
class Seen:
    """A row as the model receives it.

    Attributes:
        tiles: per image, its grids of visual tokens; none without a model.
        boxes: per image, its N boxes.
        masks: per image, bool [N, V]: the visual tokens of each box.
        prompt_tokens: length of the prompt; 0 without a model.
    """

    where: str
    row: Mapping[str, Any]
    tiles: list[tuple[Tile, ...]]
    boxes: list[Any]
    masks: list[np.ndarray]
    prompt_tokens: int


def unseen(row: Mapping[str, Any], where: str) -> Seen:
    """A row without a model: no visual token, and no length of the prompt."""
    boxes = _boxes_of(row, len(row.get("images") or []))
    return Seen(where, row, [()] * len(boxes), boxes, [np.zeros((len(b), 0), dtype=bool) for b in boxes], 0)


def _boxes_of(row: Mapping[str, Any], n_images: int) -> list[Any]:
    return (row.get("extra_info") or {}).get("boxes") or [[] for _ in range(n_images)]


class Model:
    """The processor of a model and verl's way to call it.

    Args:
        path: folder or hub name.
        coverage: share of a visual token that a box must cover, ``algorithm.attn.region.coverage``.
        where: the flag or key that names the model, for messages.
        data: ``apply_chat_template_kwargs`` and ``mm_processor_kwargs`` of the run's ``data``.
        chat_template: ``actor_rollout_ref.model.custom_chat_template`` of the run.

    Raises:
        SayoError: of ``sayo_verl.models.processors.load``.
    """

    def __init__(
        self,
        path: str,
        coverage: float = 0.5,
        *,
        where: str = "--model",
        data: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        from sayo_verl.models import processors

        fix = "correct it; `sayo inspect` also works without --model, but then does not check visual tokens"
        self.coverage = coverage
        self.family, self.config, self.processor = processors.load(path, where, fix)
        self.processor.chat_template = chat_template or self.processor.chat_template
        self._rows = processors.row_reader(self.family, self.processor, dict(data or {}))

    def see(self, row: Mapping[str, Any], where: str) -> Seen:
        """The visual tokens and prompt length of a row; D68 when the processor refuses it, or ``probe.plan`` does."""
        from sayo_verl.probe.plan import image_tiles, plan_row

        features = self._features(row, where)
        ids_S, token = features["input_ids"][0], self.config.image_token_id
        tiles = image_tiles(features, self.family, self.config, where=where)
        boxes = _boxes_of(row, len(tiles))
        plan_row(ids_S, 0, image_token_id=token, images=tiles, boxes=boxes, coverage=self.coverage, where=where)
        masks = [box_masks(b, t, self.coverage, where=where) for b, t in zip(boxes, tiles, strict=True)]
        return Seen(where, row, tiles, boxes, masks, len(ids_S))

    def prompt_tokens(self, row: Mapping[str, Any], where: str) -> int:
        """Length of a row's prompt; D68 when the processor refuses it. Boxes are ignored."""
        return len(self._features(row, where)["input_ids"][0])

    def _features(self, row: Mapping[str, Any], where: str) -> Any:
        from verl.utils.tokenizer import build_multimodal_processor_inputs

        # verl changes its arguments
        images = [dict(image) if isinstance(image, dict) else image for image in row.get("images") or []]
        example = {"prompt": [dict(message) for message in row["prompt"] or []], "images": images}
        rows, processor, options = self._rows, self.processor, self._rows.apply_chat_template_kwargs
        try:
            messages = rows._build_messages(example, key="prompt")
            text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
            opened, _, _ = rows._process_multi_modal_info(messages, rows.image_patch_size, rows.config)
            if opened is None:
                return processor.tokenizer(text=[text], add_special_tokens=False, return_tensors="pt")
            options = rows.mm_processor_kwargs
            return build_multimodal_processor_inputs(processor, text=[text], images=opened, mm_processor_kwargs=options)
        except _REFUSALS as error:  # also a SayoError of InternVL's data set
            what = f"the model's processor refuses a row ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            again = "again" if isinstance(error, OSError) else "in another size"  # Pillow's error of damaged pixels
            fix = f"remove the row, or store its images {again}"
            raise SayoError("D68", what, where=where, fix=fix) from error


def too_long(lengths: Mapping[str, int], limit: int) -> SayoError | None:
    """D68 if prompts have more than ``limit`` tokens; ``lengths``: where a row is -> tokens of its prompt."""
    over, longest = [where for where, n in lengths.items() if n > limit], max(lengths.values(), default=0)
    if not over:
        return None
    what = f"prompts are too long: max prompt {longest} > {limit}"
    got = f"{len(over)} of {len(lengths)} rows, first {lengths[over[0]]} tokens"
    fix = f"set data.max_prompt_length to {longest} or more, or prepare smaller images"
    return SayoError("D68", what, where=over[0], got=got, fix=fix)
