"""Responses to imitate, from the policy's own right answers (rejection sampling; ours).

The language-model loss of the anchoring stage needs a text after ``<Focus>``. A text that a policy would not have
written changes how it reasons: a policy that imitates an empty thought unlearns to think. Its own right answers,
sampled before the token is added, do not change it.

Rows are sampled in blocks, in any number of processes. Process n modulo their number samples block n and writes it to
``<out>.parts`` when it is done. The process that finds all blocks there writes ``out``. Random numbers are
seeded per block and try, and one process samples a block. So the number of processes changes no response.
``batch_size`` and another kind of device do.

Shape suffixes: B prompts of a batch, P prompt tokens, T response tokens.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForImageTextToText, AutoProcessor

from sayo_verl.data.messages import images_of, messages_of
from sayo_verl.errors import SayoError
from sayo_verl.focus.config import BLOCK, RespondConfig
from sayo_verl.focus.files import columns_of
from sayo_verl.focus.rows import checked
from sayo_verl.models.sampling import without_penalties
from sayo_verl.reward import compute_score

Block = tuple[Path, int, int]  # file, first row, row after the last


def write_responses(
    base: Path | str,
    files: Sequence[Path | str],
    out: Path | str,
    config: RespondConfig | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    device: str | None = None,
) -> dict[str, int]:
    """Write the rows of ``files`` with a column ``response``: the first well-formed right answer of ``tries`` samples.

    Rows without one are left out, so the rest is easier than the source. The counts say how many rows are left. After
    an interruption the same call samples the blocks that are missing.

    Args:
        base: model folder or hub name.
        files: parquet files; a column that some of them lack is null in their rows.
        out: parquet file, in the order of the source; ``<out>.parts`` holds the finished blocks.
        config: settings of the sampling; None: the defaults.
        rank, world: number of this process and how many there are; each calls this function.
        device: of the model; None: the first GPU, else the CPU.

    Returns:
        ``rows`` and ``kept``; ``rows`` and ``left``, the number of blocks that other processes have not finished yet.

    Raises:
        SayoError: F10 for no row, F18 when no row is kept, F19 when ``out`` was started
            with other settings, F24 for files whose columns do not match, the first fault of a row by the row
            contract, and what ``columns_of`` raises.
    """
    config = config or RespondConfig()
    out = Path(out)
    parts = out.with_name(f"{out.name}.parts")
    blocks = _blocks(files, BLOCK * config.batch_size, config.max_rows)
    schema = _common_schema(files)
    rows = sum(stop - start for _, start, stop in blocks)
    _check_settings(
        parts,
        {
            "base": str(base),
            "files": [[str(file), Path(file).stat().st_size] for file in files],
            "rows": rows,
            "tries": config.tries,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "batch_size": config.batch_size,
            "seed": config.seed,
        },
    )
    todo = [n for n in range(rank, len(blocks), world) if not _part(parts, n).is_file()]
    if todo:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float32 if chosen.type == "cpu" else torch.bfloat16
        model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype).to(chosen).eval()
        model.generation_config = without_penalties(model.generation_config)
        processor: Any = AutoProcessor.from_pretrained(base)
        with Progress(console=Console(stderr=True), disable=rank != 0) as progress:
            bar = progress.add_task(f"sampling responses, {world} processes", total=rows)
            for n in todo:
                progress.update(bar, completed=_done(parts, blocks))
                file, start, _ = blocks[n]
                own = [
                    checked(row, f"row {start + i} of {file}", rewarded=True)
                    for i, row in enumerate(_rows(blocks[n]).to_pylist())
                ]
                _write(
                    _part(parts, n),
                    _answers(model, processor, own, config, seed=f"{config.seed}/{n}"),
                )
            progress.update(bar, completed=_done(parts, blocks))
    left = sum(not _part(parts, n).is_file() for n in range(len(blocks)))
    if left:
        return {"rows": rows, "left": left}
    kept = _merge(parts, blocks, out, schema)
    if not kept:
        raise SayoError(
            "F18",
            "the policy gave no right answer in the required form",
            where=str(base),
            got=f"0 of {rows} rows",
            fix="give the rows a column `response` of your own, or request "
            "<think> ... </think> <answer> ... </answer> in the prompts",
        )
    return {"rows": rows, "kept": kept}


def _blocks(files: Sequence[Path | str], size: int, max_rows: int | None) -> list[Block]:
    """Runs of at most ``size`` rows, none across files."""
    for file in files:
        columns_of(file)
    left = sum(pq.read_metadata(file).num_rows for file in files) if max_rows is None else max_rows
    blocks = []
    for file in files:
        n = min(pq.read_metadata(file).num_rows, left)
        blocks += [(Path(file), start, min(start + size, n)) for start in range(0, n, size)]
        left -= n
    if not blocks:
        raise SayoError("F10", "there is no row", where=str([str(f) for f in files]), fix="name a file with rows")
    return blocks


def _common_schema(files: Sequence[Path | str]) -> pa.Schema:
    """The columns of all files, of types that hold those of each; ``response`` is left out.

    Raises:
        SayoError: F24, before anything is sampled: the rows are written to one file.
    """
    common = pa.schema([])
    for file in files:
        own = pq.read_schema(file)
        own = pa.schema([field for field in own if field.name != "response"], own.metadata)
        try:
            common = _with_columns(own.empty_table(), common).schema
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise SayoError(
                "F24",
                "the columns of the files of rows do not match",
                where=str(file),
                got=" ".join(str(error).split())[:200],
                wanted=f"types as in {files[0]}",
                fix="write the files with one schema, or sample each file alone",
            ) from error
    return common


def _with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), table], promote_options="permissive")


def _check_settings(parts: Path, settings: dict[str, Any]) -> None:
    """Check that ``parts`` was made with these settings; the first process writes them there.

    Raises:
        SayoError: F19.
    """
    parts.mkdir(parents=True, exist_ok=True)
    file = parts / "settings.json"
    if not file.is_file():
        _write(file, settings)
    found = json.loads(file.read_text())
    changed = {name: found.get(name) for name, value in settings.items() if found.get(name) != value}
    if changed:
        raise SayoError(
            "F19",
            "these responses were started with other settings",
            where=str(file),
            got={name: settings[name] for name in changed},
            wanted=changed,
            fix=f"give those settings, or name another file; to start over: rm -r {parts}",
        )


def _part(parts: Path, n: int) -> Path:
    return parts / f"{n:06d}.json"


def _done(parts: Path, blocks: Sequence[Block]) -> int:
    """Rows of the finished blocks of all processes."""
    return sum(stop - start for n, (_, start, stop) in enumerate(blocks) if _part(parts, n).is_file())


def _write(file: Path, value: Any) -> None:
    """Write JSON, as a whole or not at all."""
    scratch = file.with_name(f"{file.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=1))
    scratch.replace(file)


@functools.lru_cache(maxsize=1)
def _table(file: Path) -> pa.Table:
    return pq.read_table(file)


def _rows(block: Block) -> pa.Table:
    file, start, stop = block
    return _table(file).slice(start, stop - start)


def _answers(
    model: Any,
    processor: Any,
    rows: list[dict[str, Any]],
    config: RespondConfig,
    *,
    seed: str,
) -> list[str | None]:
    """The first right answer of each row, or None."""
    responses: list[str | None] = [None] * len(rows)
    # by default a context would be made on every GPU, by each process
    own = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=own):
        for attempt in range(config.tries):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{attempt}".encode()).digest()[:8]))
            for chosen in _batches([i for i, response in enumerate(responses) if response is None], config.batch_size):
                texts = _sample(model, processor, [rows[i] for i in chosen], config.max_new_tokens, config.temperature)
                for i, text in zip(chosen, texts, strict=True):
                    score = compute_score(rows[i].get("data_source", ""), text, rows[i]["reward_model"]["ground_truth"])
                    if score["acc"] == score["format"] == 1:
                        responses[i] = text
    return responses


def _batches(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _merge(parts: Path, blocks: Sequence[Block], out: Path, schema: pa.Schema) -> int:
    """Rows with a response, in the order of the source. Processes that finish at the same time write the same file."""
    scratch, writer, kept = out.with_name(f"{out.name}.{os.getpid()}"), None, 0
    for n, block in enumerate(blocks):
        responses = json.loads(_part(parts, n).read_text())
        chosen = [i for i, response in enumerate(responses) if response is not None]
        if not chosen:
            continue
        table = _rows(block)
        table = table.drop_columns([name for name in table.column_names if name == "response"]).take(chosen)
        table = _with_columns(table, schema)
        table = table.append_column("response", pa.array([responses[i] for i in chosen], type=pa.string()))
        if writer is None:
            writer = pq.ParquetWriter(scratch, table.schema)
        writer.write_table(table)
        kept += len(chosen)
    if writer is not None:
        writer.close()
        scratch.replace(out)
    return kept


@torch.no_grad()
def _sample(
    model: Any, processor: Any, rows: list[dict[str, Any]], max_new_tokens: int, temperature: float
) -> list[str]:
    """One response per row, drawn from the whole distribution; without special tokens, as a reward function sees it."""
    prompts = [
        processor.apply_chat_template(messages_of(row), add_generation_prompt=True, tokenize=False) for row in rows
    ]
    images = [image for row in rows for image in images_of(row)]
    inputs = processor(text=prompts, images=images or None, padding=True, padding_side="left", return_tensors="pt")
    ids = model.generate(
        **inputs.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
    )
    return processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
