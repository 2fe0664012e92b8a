"""The code and the tables in docs/ are true."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from sayo_verl.probe.statistics import CATALOGUE

ROOT = Path(__file__).parent.parent
PROBE = (ROOT / "docs" / "probe.md").read_text()


def test_probe_md_lists_every_statistic():
    table = PROBE.split("## How it reads")[0]
    told = set(re.findall(r"`([a-z_]+)`", "".join(line for line in table.splitlines() if line.startswith("| `"))))
    assert told - {"per_head", "query_row"} == set(CATALOGUE)


def test_probe_md_reads_a_plain_hugging_face_model(random_policy):
    model = AutoModelForImageTextToText.from_pretrained(random_policy, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(random_policy)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8))
    image_part = "<|vision_start|><|image_pad|><|vision_end|>"
    text = f"<|im_start|>user\n{image_part}where ?<|im_end|>\n<|im_start|>assistant\nhere ."
    inputs = dict(processor(text=[text], images=[image], return_tensors="pt"))
    names = {"model": model, "inputs": inputs, "input_ids": inputs["input_ids"], "response_length": 3}
    code = next(block for block in re.findall(r"```python\n(.*?)```", PROBE, re.S) if "ForwardTap" in block)
    exec(code, names)  # noqa: S102 (the page's own example)
    assert names["values"].shape == (12,)
    assert names["lengths"] == [12]
    mass, _ = names["measurement"].finish()["image_mass.input.L-1"]
    told = mass[~mass.isnan()]
    assert told.shape == (3,)
    assert float(names["values"].sum()) == pytest.approx(float(told.sum()), abs=1e-5)
