"""Load a model of any supported family, with its own attention kernel, and answer with transformers, without verl.

Shape suffixes: P prompt tokens.
"""

import functools
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, GenerationConfig

from sayo_verl.errors import SayoError
from sayo_verl.look.prompt import Prompt, check_context, prompt_of
from sayo_verl.models import processors
from sayo_verl.models.sampling import without_penalties
from sayo_verl.probe.taps import (
    FULL_ATTENTION,
    check_full_attention,
    configured_kinds,
    resolve_layers,
)

LONGEST = 1024  # tokens of an answer, if no other number is asked for


class LoadedModel:
    """A loaded model.

    Args:
        model: folder or hub name.
        device: None: the first GPU, else the CPU.
        dtype: None: that of the checkpoint on a GPU, float32 on a CPU.
        coverage: share of a visual token's cell that a box must cover.
        chat_template: None: the model's own.
        layers: averaged for ``mean`` and the numbers per token; negative numbers count from the last; None: every
            full-attention layer.
        query_row: ``input`` (SAYO) or ``predicting``, see ``probe.statistics``.

    Attributes:
        layers: numbers from 0.
        readable: numbers of all full-attention layers.
        kernel: ``attn_implementation`` of the model.

    Raises:
        SayoError: L17, L18, L23 or D68 for a model or processor that cannot be used, P03 or P11 for layers that cannot
            be read.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        coverage: float = 0.5,
        chat_template: str | None = None,
        layers: Sequence[int] | None = None,
        query_row: str = "input",
    ) -> None:
        self.name, self.coverage, self.chat_template, self.query_row = str(model), coverage, chat_template, query_row
        self.family, self.config, self.processor = processors.load(self.name, "--model")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        flash = self.device.type == "cuda" and find_spec("flash_attn") is not None
        self.kernel = "flash_attention_2" if flash else "sdpa"
        self._dtype = dtype
        text = self.config.get_text_config()
        self._kinds, self.n_heads = configured_kinds(text), int(text.num_attention_heads)
        self.readable = tuple(n for n, kind in enumerate(self._kinds) if kind == FULL_ATTENTION)
        self.layers = self.readable if layers is None else self._numbers(layers, "--layers")

    def _numbers(self, layers: Sequence[int], where: str) -> tuple[int, ...]:
        """Layers as numbers from 0; P03, P11."""
        numbers = resolve_layers(layers, len(self._kinds), where=where)
        check_full_attention(numbers, self._kinds, where=where)
        return numbers

    @property
    def wanted_dtype(self) -> torch.dtype | str:
        """As asked for: float32 on a CPU, ``auto`` (that of the checkpoint) on a GPU, unless it was named."""
        return self._dtype or (torch.float32 if self.device.type == "cpu" else "auto")

    @functools.cached_property
    def model(self) -> Any:
        """The weights, loaded when they are first needed, so that an engine of its own may answer before.

        Raises:
            SayoError: W06.
        """
        dtype = self.wanted_dtype
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                self.name, dtype=dtype, attn_implementation=self.kernel
            )
            return loaded.to(self.device).eval()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise SayoError(
                "W06",
                f"the model's weights cannot be loaded ({' '.join(str(error).split())[:200]})",
                where=f"--model {self.name}",
                got=f"{dtype} on {self.device}",
                fix="complete the folder, or choose another --device or --dtype",
            ) from error

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    def prompt(self, row: Mapping[str, Any], where: str) -> Prompt:
        """A row of the data contract (docs/data.md) as the model's input; errors of ``prompt_of``."""
        return prompt_of(row, where, coverage=self.coverage, **self._own())

    def _own(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "config": self.config,
            "processor": self.processor,
            "chat_template": self.chat_template,
        }

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int | None = None, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """Answer with transformers, all prompts in one batch: response ids with the end token, if there is one.

        Args:
            prompts: at least one.
            max_new_tokens: longest response; None: see ``room``.
            temperature: 0 is greedy; else sampled from the whole distribution, without the model's penalties.
            seed: of the sampling.

        Raises:
            SayoError: W05 for prompts that leave no room for the response.
        """
        max_new_tokens = self.room(prompts, max_new_tokens)
        stop = without_penalties(self.generation)
        longest = max(len(prompt.ids) for prompt in prompts)
        pad = stop.pad_token_id if stop.pad_token_id is not None else self.ends[0] if self.ends else 0

        def left(values: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
            rows = [torch.nn.functional.pad(v, (longest - len(v), 0), value=fill) for v in values]
            return torch.stack(rows).to(self.device)

        inputs: dict[str, Any] = {
            "input_ids": left([p.ids for p in prompts], pad),
            "attention_mask": left([torch.ones_like(p.ids) for p in prompts], 0),
        }
        for name in prompts[0].inputs:
            if name == "mm_token_type_ids":
                inputs[name] = left([p.inputs[name][0] for p in prompts], 0)
            else:
                inputs[name] = torch.cat([p.inputs[name] for p in prompts]).to(self.device)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
        # a sampled placeholder would be an image without pixels
        stop.update(
            max_new_tokens=max_new_tokens, pad_token_id=pad, suppress_tokens=list(self.placeholders), **sampling
        )
        own = [self.device] if self.device.type == "cuda" else []
        given, self.model.generation_config = self.model.generation_config, stop  # it fills gaps with the model's own
        try:
            with torch.random.fork_rng(devices=own):
                torch.manual_seed(seed)
                ids = self.model.generate(**inputs, generation_config=stop)
        finally:
            self.model.generation_config = given
        return [self.until_end(row[longest:].tolist()) for row in ids]

    def room(self, prompts: Sequence[Prompt], tokens: int | None = None) -> int:
        """How many tokens a response may have: as many as asked for, else ``LONGEST`` or what the context leaves.

        Raises:
            SayoError: W05 for prompts that do not leave room for it.
        """
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(prompt.ids) for prompt in prompts)
        wanted = tokens or (LONGEST if limit is None else max(min(LONGEST, limit - longest), 1))
        for prompt in prompts:
            check_context(self.config, prompt.seen, len(prompt.ids), wanted)
        return wanted

    @functools.cached_property
    def generation(self) -> GenerationConfig:
        """The model's own."""
        try:
            return GenerationConfig.from_pretrained(self.name)
        except OSError:  # the file is optional
            return GenerationConfig.from_model_config(self.config)

    @property
    def ends(self) -> list[int]:
        """Ids of tokens that end a response."""
        eos = self.generation.eos_token_id
        eos = self.processor.tokenizer.eos_token_id if eos is None else eos
        return list(eos) if isinstance(eos, list | tuple) else [] if eos is None else [eos]

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Ids that stand for visual tokens."""
        names = ("image_token_id", "video_token_id")
        return tuple(n for n in (getattr(self.config, name, None) for name in names) if n is not None)

    def until_end(self, ids: Sequence[int]) -> list[int]:
        """The ids up to and with the first end token."""
        for n, token in enumerate(ids):
            if token in self.ends:
                return list(ids[: n + 1])
        return list(ids)
