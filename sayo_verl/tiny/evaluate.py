"""Evaluation of a policy's answers and attention on held-out rows, with plain transformers.

Sampling is HF ``generate``. Attention is that of the last layer, from HF's eager attention, averaged over heads.
Nothing here uses the probe or verl, so its figures are an independent measurement.

Shape suffixes: B responses of a batch, P prompt tokens (padded on the left), T response tokens, S = P + T,
V visual tokens of an image, H heads, D vocabulary.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, Qwen3VLProcessor

from sayo_verl.data.folder import split_files
from sayo_verl.data.reading import decoded
from sayo_verl.errors import Rule, raise_first
from sayo_verl.methods import RegionMethod
from sayo_verl.reward import compute_score
from sayo_verl.tiny.policy import END, MERGE_SIZE, generate
from sayo_verl.tiny.warmup import prompt_batch
from sayo_verl.vision.grids import merged_grid
from sayo_verl.vision.masks import region_mask

SELECTED_SHARE = RegionMethod.entropy_fraction  # of a response's tokens, those with the highest entropy
EPS = 1e-8  # added to both means of the ratio


def evaluate(
    model_dir: Path | str,
    scenes: Path | str,
    *,
    samples_per_row: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 24,
    batch_size: int = 128,
    max_rows: int | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint's answers and attention on rows of a scenes file.

    Args:
        model_dir: folder that ``from_pretrained`` loads (model and processor).
        scenes: a folder of drawn scenes, of which the validation rows are used, or one of its parquet files.
        samples_per_row: responses per row; 1 when greedy.
        temperature: of the sampling; 0 for greedy.
        seed: of the sampling.
        max_new_tokens: longest response, with the end token.
        batch_size: responses per batch.
        max_rows: use only the first rows.

    Returns:
        ``rows``, ``samples_per_row``, and per measure ``{"mean", "se"}`` over rows, each the mean of its samples:
        ``accuracy``, ``format``, ``response_tokens`` (with the end token), ``entropy`` (nats, mean over tokens),
        ``target_attention`` (R_a in (0, 1), pooled over the selected tokens: it grows with their number) and
        ``distractor_attention``, ``token_target_attention`` and ``token_distractor_attention`` (R_a of single tokens,
        mean over the selected ones) and ``token_target_attention_all`` (over all tokens). The last three can be
        compared with each other, and between responses of other lengths. ``image_mass`` and ``target_mass``
        (attention on all visual tokens and on the target's, mean over the response), ``named_first`` and ``named`` (1
        if the response's reasoning starts with, or contains, the word for the target), ``box_tokens`` (visual tokens
        per target box).

    Raises:
        SayoError: D85 for rows of anything but drawn scenes.
    """
    files = split_files(Path(scenes))["val"] if Path(scenes).is_dir() else [Path(scenes)]
    rows = [row for file in files for row in pq.read_table(file).to_pylist()][:max_rows]
    strange = sum("target_boxes" not in (row.get("extra_info") or {}) for row in rows)
    what, fix = "rows are not of drawn scenes", "name a folder of `sayo prepare synthetic --task scenes`"
    raise_first([Rule("D85", bool(strange), what, str(scenes), fix, f"{strange} of {len(rows)} without target_boxes")])
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    processor = AutoProcessor.from_pretrained(model_dir)
    samples = [row for row in rows for _ in range(samples_per_row)]
    measured: list[dict[str, float]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            measured += measure_batch(model, processor, batch, temperature=temperature, max_new_tokens=max_new_tokens)
    result: dict[str, Any] = {"rows": len(rows), "samples_per_row": samples_per_row}
    for name in measured[0]:
        per_row = np.array([m[name] for m in measured]).reshape(len(rows), samples_per_row).mean(1)
        spread = float(per_row.std(ddof=1)) if len(rows) > 1 else math.nan
        result[name] = {"mean": float(per_row.mean()), "se": spread / math.sqrt(len(rows))}
    return result


@torch.no_grad()
def measure_batch(
    model: PreTrainedModel,
    processor: Qwen3VLProcessor,
    rows: list[dict[str, Any]],
    *,
    temperature: float,
    max_new_tokens: int,
) -> list[dict[str, float]]:
    """Sample one response per row and measure it; ``model`` runs eager attention, and a row has one image."""
    images = [decoded(row["images"][0], "a row of the evaluation") for row in rows]
    inputs = prompt_batch(processor, [row["extra_info"]["question"] for row in rows], images)
    ids_BS = generate(model, inputs, max_new_tokens=max_new_tokens, temperature=temperature)
    n_prompt = inputs["input_ids"].shape[1]
    response_BT = ids_BS[:, n_prompt:]
    is_end_BT = (response_BT == processor.tokenizer.convert_tokens_to_ids(END)).long()
    valid_BT = is_end_BT.cumsum(1) - is_end_BT == 0  # up to and including the first end token
    logits_BTD, attention_BTS = _teacher_forced(model, inputs, ids_BS, valid_BT)
    log_p_BTD = (logits_BTD / temperature if temperature > 0 else logits_BTD).log_softmax(-1)
    entropy_BT = -(log_p_BTD.exp() * log_p_BTD).sum(-1)
    measured = []
    for b, row in enumerate(rows):
        n = int(valid_BT[b].sum())
        t, h, w = inputs["image_grid_thw"][b].tolist()
        tiles = merged_grid(t, h, w, MERGE_SIZE, where=f"row {b}")
        is_image_S = ids_BS[b] == model.config.image_token_id
        visual_TV = attention_BTS[b, :n, is_image_S].double().numpy()
        entropy_T = entropy_BT[b, :n].double().numpy()
        text = processor.tokenizer.decode(response_BT[b, :n], skip_special_tokens=True)
        info = row["extra_info"]
        target_V, distractor_V = (
            region_mask(info[key][0], tiles, where=f"row {b}, {key}") for key in ("target_boxes", "distractor_boxes")
        )
        selected = select_tokens(entropy_T)
        of_token_T, of_distractor_T = (
            np.array([region_attention(visual_TV[t : t + 1], region_V) for t in range(n)])
            for region_V in (target_V, distractor_V)
        )
        score = compute_score(row["data_source"], text, row["reward_model"]["ground_truth"], info)
        thought = text.partition("</think>")[0].removeprefix("<think>").split()
        measured.append(
            {
                "accuracy": float(score["acc"]),
                "format": float(score["format"]),
                "response_tokens": float(n),
                "entropy": float(entropy_T.mean()),
                "target_attention": region_attention(visual_TV[selected], target_V),
                "token_target_attention": float(of_token_T[selected].mean()),
                "token_target_attention_all": float(of_token_T.mean()),
                "token_distractor_attention": float(of_distractor_T[selected].mean()),
                "distractor_attention": region_attention(visual_TV[selected], distractor_V),
                "image_mass": float(visual_TV.sum(1).mean()),
                "target_mass": float(visual_TV[:, target_V].sum(1).mean()),
                "named_first": float(thought[:1] == [info["key_word"]]),
                "named": float(info["key_word"] in thought),
                "box_tokens": float(target_V.sum()),
            }
        )
    return measured


def _teacher_forced(
    model: PreTrainedModel, inputs: Any, ids_BS: torch.Tensor, valid_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, T, D] that sampled each response token, and the attention row [B, T, S] with each as the input."""
    n_prompt = inputs["input_ids"].shape[1]
    padded = dict(inputs)
    padded["input_ids"] = ids_BS
    padded["attention_mask"] = torch.cat([inputs["attention_mask"], valid_BT.long()], 1)
    padded["mm_token_type_ids"] = torch.cat(
        [inputs["mm_token_type_ids"], torch.zeros_like(ids_BS[:, n_prompt:], dtype=torch.int)], 1
    )
    output = model(**padded, output_attentions=True, use_cache=False)
    return output.logits[:, n_prompt - 1 : -1].float(), output.attentions[-1].mean(1)[:, n_prompt:]


def select_tokens(entropy_T: np.ndarray, share: float = SELECTED_SHARE) -> np.ndarray:
    """Indices of the ``max(1, floor(share n))`` tokens of highest entropy, ascending; ties go to earlier tokens."""
    k = max(1, math.floor(share * len(entropy_T)))
    return np.sort(np.argsort(-entropy_T, kind="stable")[:k])


def region_attention(visual_TV: np.ndarray, region_V: np.ndarray) -> float:
    """R_a = (1 + tanh(log((a + eps) / (v + eps)))) / 2 in (0, 1); 0.5 if the region gets average attention.

    Args:
        visual_TV: attention of some response tokens to the visual tokens.
        region_V: bool, the visual tokens of the region.
    """
    a, v = float(visual_TV[:, region_V].mean()), float(visual_TV.mean())
    return (1 + math.tanh(math.log((a + EPS) / (v + EPS)))) / 2
