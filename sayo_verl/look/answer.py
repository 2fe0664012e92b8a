"""Answers of a model: vLLM in a process of its own, or transformers in this one.

vLLM's process ends before the weights are loaded here, so its memory is free for the measurement. It gets the
observer's own prompt ids, in which one placeholder stands for an image, and returns the ids that it made of them. They
must be equal to the observer's: otherwise the answer would be to another prompt than the one that is measured.
"""

import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sayo_verl.errors import SayoError
from sayo_verl.look.observe import Observer
from sayo_verl.look.prompt import Prompt
from sayo_verl.models.internvl import one_token_per_image
from sayo_verl.reward import compute_score

ENGINES = ("auto", "transformers", "vllm")
BATCH = 8  # prompts that transformers answers at once
EAGER = 256  # below so many prompts, vLLM's compilation and graphs take longer than they save


def chosen_engine(engine: str, device: torch.device) -> str:
    """``auto`` is vLLM if it is installed and the model runs on a GPU: on a CPU its start takes half a minute."""
    if engine != "auto":
        return engine
    return "vllm" if device.type == "cuda" and find_spec("vllm") is not None else "transformers"


def accuracy_of(row: Mapping[str, Any], text: str) -> float:
    """``acc`` of the reward function; NaN for a row without a ground truth."""
    truth = (row.get("reward_model") or {}).get("ground_truth")
    if truth is None:
        return float("nan")
    return float(compute_score(row.get("data_source") or "", text, truth, row.get("extra_info"))["acc"])


def answers(
    observer: Observer,
    prompts: Sequence[Prompt],
    *,
    engine: str = "auto",
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    tick: Callable[[int], None] = lambda n: None,
) -> list[list[int]]:
    """Answer all prompts.

    Args:
        observer: its model answers.
        prompts: of the observer.
        engine: one of ``ENGINES``.
        max_new_tokens: longest response; None: see ``Observer.room``.
        temperature: 0 is greedy; else sampled from the whole distribution, without the model's penalties.
        seed: of the sampling.
        tick: is called with the number of new answers.

    Returns:
        Response ids, with the end token if there is one.

    Raises:
        SayoError: W05 for prompts that leave no room, W13 for a prompt that vLLM makes other tokens of, W14 if vLLM is
            not installed or fails.
    """
    room = observer.room(prompts, max_new_tokens)
    settings: dict[str, Any] = {"max_new_tokens": room, "temperature": temperature, "seed": seed}
    if chosen_engine(engine, observer.device) == "vllm":
        found = _vllm(observer, prompts, settings)
        tick(len(prompts))
        return found
    found = []
    for first in range(0, len(prompts), BATCH):
        found += observer.answer(prompts[first : first + BATCH], **settings)
        tick(len(found) - first)
    return found


def _vllm(observer: Observer, prompts: Sequence[Prompt], settings: dict[str, Any]) -> list[list[int]]:
    if find_spec("vllm") is None:
        raise SayoError(
            "W14",
            "vLLM is not installed",
            where="--engine vllm",
            fix="install it, or use --engine transformers",
        )
    on_gpu = observer.device.type == "cuda"
    job = {
        "model": observer.name,
        "prompts": [
            {"ids": _collapsed(observer, prompt), "images": [_png(picture) for picture in prompt.pictures]}
            for prompt in prompts
        ],
        "sampling": settings,
        "placeholders": list(observer.placeholders),
        "ends": observer.ends,
        "dtype": str(observer.wanted_dtype).removeprefix("torch."),
        "eager": not on_gpu or len(prompts) < EAGER,
    }
    with tempfile.TemporaryDirectory(prefix="sayo-look-") as folder:
        asked, answered = Path(folder, "prompts.json"), Path(folder, "answers.json")
        asked.write_text(json.dumps(job))
        command = [sys.executable, "-m", "sayo_verl.look.vllm_answers", str(asked), str(answered)]
        ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_environment(on_gpu)})
        if ended.returncode or not answered.is_file():
            lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()] or ["no message"]
            # the last error only says that the engine's own process died of the first one
            cause = next((line for line in lines if re.search(r"\w(Error|Exception): .", line)), lines[-1])
            raise SayoError(
                "W14",
                "vLLM did not answer",
                where=f"--engine vllm, model {observer.name}",
                got=f"exit status {ended.returncode}: {cause[:300]}",
                fix="use --engine transformers, or correct what vLLM names",
            )
        results = json.loads(answered.read_text())
    for prompt, result in zip(prompts, results, strict=True):
        own = prompt.ids.tolist()
        if result["prompt_ids"] != own:
            differ = sum(a != b for a, b in zip(result["prompt_ids"], own, strict=False))
            raise SayoError(
                "W13",
                "vLLM made another prompt of the same images than the model's processor",
                where=prompt.seen.where,
                got=f"{len(result['prompt_ids'])} tokens, {differ} of the first ones differ",
                wanted=f"the {len(own)} tokens that are measured",
                fix="use --engine transformers",
            )
    return [observer.until_end(result["ids"]) for result in results]


def _collapsed(observer: Observer, prompt: Prompt) -> list[int]:
    """Prompt ids as vLLM takes them: one placeholder per image."""
    ids, image = prompt.ids.tolist(), int(observer.config.image_token_id)
    if observer.family.geometry == "grid":  # the tokens of two images never touch
        return [token for n, token in enumerate(ids) if token != image or n == 0 or ids[n - 1] != image]
    return one_token_per_image(
        ids,
        start=observer.processor.start_image_token_id,
        image=image,
        end=observer.processor.end_image_token_id,
        tokens_per_tile=observer.processor.image_seq_length,
    )


def _png(picture: Any) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def _environment(on_gpu: bool) -> dict[str, str]:
    """What vLLM's process needs besides this process's variables. On a CPU compilation takes longer than an answer."""
    own = {"VLLM_NO_USAGE_STATS": "1"}
    if not on_gpu:
        own |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")}
    return own
