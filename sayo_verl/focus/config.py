"""Settings of the anchoring stage. No model library is imported: a command line can be checked on any machine."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sayo_verl.errors import Rule, SayoError, raise_first

BLOCK = 4  # batches of responses that one process samples as a unit
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class FocusConfig:
    """Settings of the training; all defaults are ours.

    Attributes:
        weight: lambda, of the anchoring loss; 0 is plain supervised training.
        alpha: background share of the target.
        layers: decoder layers of p, from 0, negative ones from the last; empty: floor(2 L / 3).
        steps, batch_size, accumulation: optimiser steps, rows per device and forward, forwards per step.
        learning_rate, warmup_steps, weight_decay, clip: AdamW with linear rise, then constant; gradient norm limit.
        lora_rank, lora_alpha: rank 0 trains all weights of the decoder; otherwise LoRA on its projections, and the row
            of ``<Focus>`` of the embedding.
        train_vision: also train the vision tower (not with LoRA).
        dtype: of the weights, in the training and in the folder.
        attention: ``attn_implementation``; empty: transformers' choice.
        checkpointing: gradient checkpointing, non-reentrant.
        max_tokens: longest row; 0: any.
        seed: of the order of the rows and of LoRA's weights.
        trainer_args: any fields of transformers' ``TrainingArguments``.

    Raises:
        SayoError: F05.
    """

    weight: float = 1.0
    alpha: float = 0.1
    layers: tuple[int, ...] = ()
    steps: int = 150
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    weight_decay: float = 0.0
    clip: float = 1.0
    lora_rank: int = 0
    lora_alpha: int = 32
    train_vision: bool = False
    dtype: str = "float32"
    attention: str = ""
    checkpointing: bool = False
    max_tokens: int = 0
    seed: int = 0
    trainer_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        raise_first(
            [
                self._rule(not 0 <= self.weight < float("inf"), "weight", "a finite number >= 0"),
                self._rule(not 0 <= self.alpha < 1, "alpha", "a number in [0, 1)"),
                self._rule(
                    min(self.steps, self.batch_size, self.accumulation) < 1,
                    "steps, batch_size, accumulation",
                    "at least 1",
                ),
                self._rule(not 0 <= self.warmup_steps < self.steps, "warmup_steps, steps", "0 <= warmup_steps < steps"),
                self._rule(not 0 < self.learning_rate < float("inf"), "learning_rate", "a finite number > 0"),
                self._rule(self.lora_rank < 0, "lora_rank", "at least 0"),
                self._rule(self.lora_rank > 0 and self.train_vision, "lora_rank, train_vision", "one or the other"),
                self._rule(self.dtype not in DTYPES, "dtype", f"one of {list(DTYPES)}"),
            ]
        )

    def _rule(self, broken: bool, names: str, wanted: str) -> Rule:
        return Rule(
            "F05",
            broken,
            "a setting of the anchoring stage is out of range",
            where="FocusConfig",
            got=", ".join(f"{name}={getattr(self, name)!r}" for name in names.split(", ")),
            wanted=wanted,
            fix=f"change {names}",
        )


@dataclass(frozen=True)
class RespondConfig:
    """Settings of the sampling of responses to imitate; all defaults are ours.

    Attributes:
        tries: samples of a row, at most.
        max_new_tokens: tokens of a sample.
        batch_size: rows that are sampled together.
        max_rows: sample the first rows only; None: all.
        temperature: of the distribution, which is not truncated.
        seed: of the samples.

    Raises:
        SayoError: F05.
    """

    tries: int = 4
    max_new_tokens: int = 512
    batch_size: int = 32
    max_rows: int | None = None
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {
            "tries": self.tries,
            "max-new-tokens": self.max_new_tokens,
            "batch-size": self.batch_size,
            "max-rows": self.max_rows,
        }
        rules = [_rule(n is not None and n < 1, name, n, "at least 1") for name, n in counts.items()]
        heat = self.temperature
        raise_first([*rules, _rule(not 0 < heat < math.inf, "temperature", heat, "a positive number")])


def _rule(broken: bool, name: str, got: float | None, wanted: str) -> Rule:
    return Rule("F05", broken, "a number is out of range", where=f"--{name}", got=got, wanted=wanted, fix="correct it")


def check_new_folder(folder: Path, fix: str) -> None:
    """Refuse a folder that has files.

    Raises:
        SayoError: F16.
    """
    if folder.exists() and any(folder.iterdir()):
        raise SayoError("F16", "the folder has files", where=str(folder), fix=fix)
