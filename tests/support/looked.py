"""Rows with pictures for the tests of `sayo look`, and the truth about them from eager attention in float64."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.eager_oracle import RowTruth, eager_truth
from support.engine_rows import QUESTION, RowShape

from sayo_verl.look.observe import Observer
from sayo_verl.look.prompt import Prompt


def row_of(shape: RowShape, seed: int = 0) -> dict[str, Any]:
    """A row of the data contract with random pictures."""
    rng = np.random.default_rng(seed)
    images = []
    for width, height in shape.images:
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(data, "PNG")
        images.append({"bytes": data.getvalue()})
    return {
        "data_source": "test/look",
        "prompt": [{"role": "user", "content": "<image>" * len(images) + QUESTION}],
        "images": images,
        "reward_model": {"style": "rule", "ground_truth": "red"},
        "extra_info": {"boxes": shape.boxes},
    }


def response_of(length: int, seed: int = 0) -> list[int]:
    """Ids of ordinary tokens."""
    return np.random.default_rng(seed).integers(20, 200, length).tolist()


def truth_of(observer: Observer, prompt: Prompt, ids: list[int]) -> RowTruth:
    """The attention of prompt and response, of transformers' eager model in float64."""
    processor, model = observer.processor, observer.model.model
    text = processor.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=False)
    image = dict(processor(text=[text], images=list(prompt.pictures), return_tensors="pt"))
    assert image["input_ids"][0].tolist() == prompt.ids.tolist()
    ids_S = torch.cat([prompt.ids, torch.tensor(ids)])
    positions = torch.arange(len(ids_S))
    if observer.family.geometry == "grid":
        types = torch.nn.functional.pad(image["mm_token_type_ids"], (0, len(ids)))
        positions = model.get_rope_index(ids_S[None], types, image["image_grid_thw"])[0].squeeze(1)
    row = {
        "input_ids": ids_S,
        "prompts": prompt.ids,
        "position_ids": positions,
        "multi_modal_inputs": image,
        "extra_info": {"boxes": prompt.boxes},
    }
    (truth,) = eager_truth(observer.name, [row])
    return truth
