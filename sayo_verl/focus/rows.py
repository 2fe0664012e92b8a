"""Parquet rows of the reinforcement stage as teacher-forced batches of the anchoring stage.

A row has ``prompt`` (messages; ``<image>`` in a text is the place of the next image), ``images``, ``extra_info.boxes``
and ``reward_model.ground_truth`` as in all rooms. A column ``response`` is the text to imitate, without the end token.
If it is absent or null, the target is ``<think> </think><answer> GROUND TRUTH</answer>``.

Shape suffixes: B rows, S tokens, V visual tokens of one row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from sayo_verl.data.contract import Demands, RowContract
from sayo_verl.data.messages import images_of, messages_of
from sayo_verl.errors import SayoError
from sayo_verl.focus.files import NEEDED, columns_of, has_boxes
from sayo_verl.focus.loss import IGNORE, FocusBatch, target_distribution
from sayo_verl.focus.token import focus_token_id
from sayo_verl.models.families import FAMILIES, family_of
from sayo_verl.probe.plan import image_tiles, plan_row

REGION_COVERAGE = 0.5  # of a cell, for figures; the loss takes shares as they are
FOCUS_KEY = "focus"  # of a batch: its FocusBatch


KNOWN = {"images", "videos", "audios", "extra_info", "response", "data_source"}


class AnchorRows(Dataset):
    """Rows of parquet files, as dictionaries.

    Args:
        files: parquet files with the same columns.
        max_rows: take the first ones only; None: all.

    Raises:
        SayoError: F10 for no row, and what ``columns_of`` raises.
    """

    def __init__(self, files: Sequence[Path | str], *, max_rows: int | None = None) -> None:
        tables = []
        for file in files:
            table = pq.read_table(file, columns=sorted((NEEDED | KNOWN) & columns_of(file)))
            tables += [table.slice(i, 1) for i in range(table.num_rows)]
        self._rows = tables[:max_rows]  # each is a view: no row is copied before it is read
        if not self._rows:
            raise SayoError("F10", "there is no row", where=str([str(f) for f in files]), fix="name a file with rows")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row that fulfils the row contract, with ``_where``.

        Raises:
            SayoError: the first fault of ``sayo_verl.data.contract``.
        """
        row = self._rows[index].to_pylist()[0]
        return checked(row, f"row {index}", rewarded=not row.get("response"))  # else the ground truth is imitated

    def without_boxes(self) -> int:
        """How many rows have no box: they train the language-model loss alone."""
        return sum(
            "extra_info" not in table.column_names or not has_boxes(table.select(["extra_info"]).to_pylist()[0])
            for table in self._rows
        )

    def without_response(self) -> int:
        """How many rows have no text to imitate; they imitate an empty thought."""
        return sum("response" not in t.column_names or not t["response"][0].as_py() for t in self._rows)


def checked(row: dict[str, Any], where: str, *, rewarded: bool) -> dict[str, Any]:
    """A row that fulfils the row contract, with ``_where``.

    Args:
        row: as pyarrow gives it.
        where: names the row.
        rewarded: the ground truth is used.

    Raises:
        SayoError: the first fault of ``sayo_verl.data.contract``.
    """
    looked = RowContract(Demands(rewarded=rewarded)).look(row, where)
    if looked.faults:
        raise looked.faults[0]
    return {"images": None, "extra_info": None, **row, "_where": where}


def response_of(row: dict[str, Any]) -> str:
    """The text to imitate."""
    if row.get("response"):
        return row["response"]
    return f"<think> </think><answer> {row['reward_model']['ground_truth']}</answer>"


class FocusCollator:
    """Rows to model inputs [B, S], labels and ``FocusBatch``.

    Args:
        processor: the model's, with ``<Focus>``.
        config: the model's HF config.
        alpha: background share of the target.
        max_tokens: longest row; None: any.
        padding_side: of the batch.

    Raises:
        SayoError: F12 for a family that this stage does not support, F03 for a processor without the token.
    """

    def __init__(
        self, processor: Any, config: Any, *, alpha: float, max_tokens: int | None = None, padding_side: str = "right"
    ) -> None:
        self.family = family_of(config.model_type, where="the loaded model")
        if self.family.geometry != "grid":
            raise SayoError(
                "F12",
                "the anchoring stage does not support the images of this family",
                where="config.json",
                got=config.model_type,
                fix="use a Qwen2.5-VL or Qwen3-VL model",
                wanted=", ".join(n for n, f in FAMILIES.items() if f.geometry == "grid"),
            )
        self.processor, self.config, self.alpha = processor, config, alpha
        self.max_tokens, self.padding_side = max_tokens, padding_side
        self.focus = focus_token_id(processor)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Model inputs, ``labels`` [B, S] (response and end token, ``IGNORE`` elsewhere) and ``focus``.

        Raises:
            SayoError: D09 for images that do not match the prompt, F13 when a row is not prompt, ``<Focus>``, response,
                F14 for a row that is too long, and what ``image_tiles`` and ``plan_row`` raise for bad grids and boxes.
        """
        end = self.processor.tokenizer.eos_token
        prompts = [
            self.processor.apply_chat_template(messages_of(row), add_generation_prompt=True, tokenize=False)
            for row in rows
        ]
        responses = [response_of(row) + end for row in rows]
        images = [image for row in rows for image in images_of(row)]
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        batch = dict(
            self.processor(
                text=texts, images=images or None, padding=True, padding_side=self.padding_side, return_tensors="pt"
            )
        )
        ids_BS, own_BS = batch["input_ids"], batch["attention_mask"].bool()
        batch["labels"] = torch.full_like(ids_BS, IGNORE)
        image_BS, region_BS = torch.zeros_like(own_BS), torch.zeros_like(own_BS)
        visible_BS, target_BS = torch.zeros_like(own_BS), torch.zeros_like(ids_BS, dtype=torch.float32)
        at, grids = [], iter(batch["image_grid_thw"] if images else [])
        for b, (row, response) in enumerate(zip(rows, responses, strict=True)):
            where = row["_where"]
            columns = own_BS[b].nonzero().flatten()
            answer = self.processor.tokenizer(response)["input_ids"]
            ids_S, n = ids_BS[b, columns], len(answer)
            focus = len(ids_S) - n - 1
            if focus < 0 or ids_S[focus] != self.focus or ids_S[focus + 1 :].tolist() != answer:
                raise SayoError(
                    "F13",
                    "a row is not its prompt, <Focus> and its response",
                    where=where,
                    got=self.processor.tokenizer.decode(ids_S[max(focus - 3, 0) : focus + 4]),
                    wanted="<Focus> right before the response",
                    fix="use the processor of a folder that this stage wrote",
                )
            if self.max_tokens is not None and len(ids_S) > self.max_tokens:
                raise SayoError(
                    "F14",
                    "a row is too long",
                    where=where,
                    got=f"{len(ids_S)} tokens",
                    wanted=f"at most {self.max_tokens}",
                    fix="remove it, make its images smaller or raise --max-tokens",
                )
            batch["labels"][b, columns[-n:]] = ids_S[-n:]
            row_grids = [next(grids) for _ in row["images"] or []]
            tiles = image_tiles(
                {"image_grid_thw": torch.stack(row_grids)} if row_grids else {}, self.family, self.config, where=where
            )
            boxes = (row["extra_info"] or {}).get("boxes") or []
            plan = plan_row(
                ids_S,
                n,
                image_token_id=self.config.image_token_id,
                images=tiles,
                boxes=boxes,
                coverage=REGION_COVERAGE,
                where=where,
            )
            at.append(int(columns[focus]))
            visible_BS[b, columns[: focus + 1]] = True
            image_BS[b, columns] = plan.keys["image"]
            region_BS[b, columns] = plan.keys["region"]
            if tiles and has_boxes(row):
                q_V = target_distribution(boxes, tiles, self.alpha, where=where)
                target_BS[b, columns[plan.image_columns]] = torch.from_numpy(q_V).float()
        has_target = tuple((target_BS.sum(1) > 0).tolist())
        batch[FOCUS_KEY] = FocusBatch(tuple(at), has_target, visible_BS, image_BS, target_BS, region_BS)
        return batch
