"""Responses to imitate, from the policy's own right answers (rejection sampling; ours).

The language-model loss of the anchoring stage needs a text after ``<Focus>``. A text that a policy would not have
written changes how it reasons: imitating an empty thought unlearns thinking. Its own right answers, sampled before the
token is there, keep what it does.

Shape suffixes: B prompts of a batch, P prompt tokens, T response tokens.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForImageTextToText, AutoProcessor

from sayo_verl.anchoring.rows import images_of, messages_of
from sayo_verl.errors import SayoError
from sayo_verl.reward import compute_score


@torch.no_grad()
def write_responses(
    base: Path | str,
    source: Path | str,
    out: Path | str,
    *,
    tries: int = 4,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    batch_size: int = 32,
    max_rows: int | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Write the rows of ``source`` with a column ``response``: the first well-formed right answer of ``tries`` samples.

    Rows without one are left out, so what remains is easier than the source: the counts say by how much.

    Returns:
        ``rows`` asked and ``kept``.

    Raises:
        SayoError: D09 for images that do not fit a prompt, F18 when no row is kept.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype).to(device).eval()
    processor: Any = AutoProcessor.from_pretrained(base)
    table = pq.read_table(source).slice(0, max_rows)
    rows = [{**row, "_where": f"row {i}"} for i, row in enumerate(table.to_pylist())]
    responses: list[str | None] = [None] * len(rows)
    with torch.random.fork_rng(), Progress(console=Console(stderr=True)) as progress:
        torch.manual_seed(seed)
        bar = progress.add_task("sampling responses", total=tries * len(rows))
        for _ in range(tries):
            open_rows = [i for i, response in enumerate(responses) if response is None]
            progress.advance(bar, len(rows) - len(open_rows))
            for start in range(0, len(open_rows), batch_size):
                chosen = open_rows[start : start + batch_size]
                texts = _sample(model, processor, [rows[i] for i in chosen], max_new_tokens, temperature)
                for i, text in zip(chosen, texts, strict=True):
                    score = compute_score(rows[i].get("data_source", ""), text, rows[i]["reward_model"]["ground_truth"])
                    if score["acc"] == score["format"] == 1:
                        responses[i] = text
                progress.advance(bar, len(chosen))
    kept = [i for i, response in enumerate(responses) if response is not None]
    if not kept:
        raise SayoError("F18", "the policy answered no row rightly and in the asked form", where=str(base),
                        got=f"0 of {len(rows)} rows", fix="give the rows a column `response` of your own, or ask for "
                        "<think> ... </think> <answer> ... </answer> in the prompts")  # fmt: skip
    texts_column = pa.array([responses[i] for i in kept], type=pa.string())
    pq.write_table(table.take(kept).append_column("response", texts_column), out)
    return {"rows": len(rows), "kept": len(kept)}


def _sample(
    model: Any, processor: Any, rows: list[dict[str, Any]], max_new_tokens: int, temperature: float
) -> list[str]:
    """One response per row, drawn from the whole distribution; without special tokens, as a reward function sees it."""
    prompts = [processor.apply_chat_template(messages_of(row), add_generation_prompt=True, tokenize=False)
               for row in rows]  # fmt: skip
    images = [image for row in rows for image in images_of(row)]
    inputs = processor(text=prompts, images=images or None, padding=True, padding_side="left", return_tensors="pt")
    ids = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=True,
                         temperature=temperature, top_k=0, top_p=1.0)  # fmt: skip
    return processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
