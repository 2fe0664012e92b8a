"""A tiny Qwen3-VL that walks: its weights at the start, batched sampling, log-probs, and what the probe measures.

All prompts have the same length, so rows need no padding on the left. The image and the prompt are computed once and
their keys and values are repeated for the responses of a group.

Shape suffixes: B prompts, N = B n rows (n responses of each prompt, side by side), P prompt tokens, T response tokens
(padded on the right), S = P + T, V visual tokens of an image, D hidden size, W vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3VLProcessor
from transformers.cache_utils import DynamicCache

from sayo_verl.models.families import family_of
from sayo_verl.scenes.walk import Walk
from sayo_verl.scenes.walk_truth import Truth
from sayo_verl.tiny.policy import END, PAD, TinyPolicyConfig, build_model, build_processor
from sayo_verl.tiny.warmup import prompt_batch

Box = tuple[float, ...]
POLICY = TinyPolicyConfig(task="walk", layers=3, kv_heads=4, vision_depth=1)
LOOK_LAYER, LOOK_HEADS = 1, 2  # where queries equal keys at the start, and in how many heads
POSITION_SCALE = 20.0  # of the vision tower's position embeddings; with the usual weights the pixels drown them


@dataclass(frozen=True)
class Prompts:
    """B walks as inputs of the model: ids [B, P], pixels of all patches, grids [B, 3], token types [B, P]."""

    walks: Sequence[Walk]
    ids: torch.Tensor
    pixels: torch.Tensor
    grids: torch.Tensor
    types: torch.Tensor

    def row(self, i: int) -> dict[str, torch.Tensor]:
        """What a processor returns for one of them."""
        patches = self.pixels.shape[0] // len(self.walks)
        return {"pixel_values": self.pixels[i * patches : (i + 1) * patches], "image_grid_thw": self.grids[i : i + 1]}


class WalkPolicy:
    """A model and its processor, both ordinary ones of transformers.

    Attributes:
        model, processor: a Qwen3-VL whose words of the walk are single tokens.
        text, vision: parts of the model.
        words: of each token id; "" for special tokens.
        ids: of each word with a space before it, as words stand in a response.
        end, pad: token ids.
    """

    def __init__(self, model: PreTrainedModel, processor: Qwen3VLProcessor) -> None:
        self.model, self.processor = model, processor
        self.text, self.vision = model.model.language_model, model.model.visual
        tokenizer = processor.tokenizer
        texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
        special = set(tokenizer.all_special_ids)
        self.words = ["" if i in special else text.strip() for i, text in enumerate(texts)]
        self.ids = {text[1:]: i for i, text in enumerate(texts) if text.startswith(" ")}
        self.family = family_of(model.config.model_type, where="the policy")
        self.end, self.pad = (tokenizer.convert_tokens_to_ids(token) for token in (END, PAD))

    def prompts(self, walks: Sequence[Walk]) -> Prompts:
        """Inputs of walks with an image."""
        inputs = prompt_batch(self.processor, [walk.question for walk in walks], [walk.image for walk in walks])
        assert bool(inputs["attention_mask"].all()), "prompts of different lengths"
        names = ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids")
        return Prompts(walks, *(inputs[name] for name in names))

    def encode(self, responses: Sequence[Sequence[str]]) -> torch.Tensor:
        """Ids [N, T] of words and the end token, padded on the right; each word is one token."""
        rows = [torch.tensor([*(self.ids[word] for word in words), self.end]) for words in responses]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)

    def truths(self, walks: Sequence[Walk], ids_NT: torch.Tensor) -> list[Truth]:
        """The truth of each row's words, one a token, without the end token."""
        n = len(ids_NT) // len(walks)
        out = []
        for row, ids in enumerate(ids_NT.tolist()):
            length = ids.index(self.end) if self.end in ids else len(ids)
            out.append(walks[row // n].truth([self.words[i] for i in ids[:length]]))
        return out

    # ------------------------------------------------------------------------------------------------ passes
    def see(self, pixels: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features [B V, D] of the visual tokens, and those that are added to the first text layers."""
        seen = self.vision(pixels, grids)
        return seen.pooler_output, seen.deepstack_features

    def _embedded(self, prompts: Prompts, pixels: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
        """Embeddings [B, P, D] of the prompts, and the model's arguments that go with them."""
        features, deep = self.see(prompts.pixels if pixels is None else pixels, prompts.grids)
        image_BP = prompts.ids == self.model.config.image_token_id
        embedded = self.text.embed_tokens(prompts.ids).masked_scatter(image_BP[..., None], features)
        return embedded, {"visual_pos_masks": image_BP, "deepstack_visual_embeds": deep}

    def _positions(self, prompts: Prompts, T: int) -> torch.Tensor:
        """[3, 1, P + T], the same for all rows."""
        ids = torch.nn.functional.pad(prompts.ids[:1], (0, T), value=self.pad)
        types = torch.nn.functional.pad(prompts.types[:1], (0, T))
        return self.model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=prompts.grids[:1])[0]

    def _run(self, embedded: torch.Tensor, positions: torch.Tensor, **more: Any) -> torch.Tensor:
        positions = positions.expand(-1, embedded.shape[0], -1)
        return self.text(inputs_embeds=embedded, position_ids=positions, **more).last_hidden_state

    def _prefix(self, prompts: Prompts, positions: torch.Tensor, n: int) -> tuple[torch.Tensor, DynamicCache]:
        """The hidden state [N, 1, D] after the prompt, and its keys and values, repeated n times."""
        cache = DynamicCache(config=self.text.config)
        embedded, image = self._embedded(prompts)
        hidden = self._run(
            embedded, positions[..., : embedded.shape[1]], past_key_values=cache, use_cache=True, **image
        )
        if n > 1:
            cache.batch_repeat_interleave(n)
        return hidden[:, -1:].repeat_interleave(n, 0), cache

    @torch.no_grad()
    def sample(
        self, prompts: Prompts, n: int, max_tokens: int, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Responses, long [N, T], from the whole distribution at temperature 1, or greedy without a generator."""
        P = prompts.ids.shape[1]
        positions = self._positions(prompts, max_tokens)
        hidden, cache = self._prefix(prompts, positions, n)
        out: list[torch.Tensor] = []
        ended = torch.zeros(len(hidden), dtype=torch.bool)
        for t in range(max_tokens):
            logits_NW = self.model.lm_head(hidden[:, -1])
            if generator is None:
                ids_N = logits_NW.argmax(-1)
            else:
                ids_N = torch.multinomial(logits_NW.softmax(-1), 1, generator=generator)[:, 0]
            out.append(ids_N.masked_fill(ended, self.pad))
            ended = ended | (ids_N == self.end)
            if bool(ended.all()) or t == max_tokens - 1:
                break
            embedded = self.text.embed_tokens(out[-1])[:, None]
            hidden = self._run(embedded, positions[..., P + t : P + t + 1], past_key_values=cache, use_cache=True)
        return torch.stack(out, 1)

    def log_p(self, prompts: Prompts, ids_NT: torch.Tensor) -> torch.Tensor:
        """Log-probs [N, T, W] of all tokens, with their gradient."""
        return self.model.lm_head(self._hidden(prompts, ids_NT)).log_softmax(-1)

    def log_probs(self, prompts: Prompts, ids_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs with their gradient, and entropies, [N, T] in nats, at temperature 1."""
        return self._token_values(self._hidden(prompts, ids_NT), ids_NT)

    def _hidden(self, prompts: Prompts, ids_NT: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, T, D] of the rows that predict each token; a prompt is computed once."""
        n, T, P = len(ids_NT) // len(prompts.walks), ids_NT.shape[1], prompts.ids.shape[1]
        positions = self._positions(prompts, T)
        first, cache = self._prefix(prompts, positions, n)
        rest = self._run(
            self.text.embed_tokens(ids_NT[:, :-1]), positions[..., P : P + T - 1], past_key_values=cache, use_cache=True
        )
        return torch.cat([first, rest], 1)

    def _token_values(self, hidden_NTD: torch.Tensor, ids_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = self.model.lm_head(hidden_NTD).log_softmax(-1)
        entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
        return log_p.gather(-1, ids_NT[..., None])[..., 0], entropy

    def mask(self, ids_NT: torch.Tensor) -> torch.Tensor:
        """float32 [N, T], 1 up to the end token."""
        ends = (ids_NT == self.end).long()
        return ((ends.cumsum(-1) - ends) == 0).float()

    def whole_rows(
        self, prompts: Prompts, ids_NT: torch.Tensor, pixels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``log_probs``, without its gradient, from whole rows, as the probe reads them."""
        n, T, P = len(ids_NT) // len(prompts.walks), ids_NT.shape[1], prompts.ids.shape[1]
        embedded, image = self._embedded(prompts, pixels)
        embedded = torch.cat([embedded.repeat_interleave(n, 0), self.text.embed_tokens(ids_NT)], 1)
        deep = [f.unflatten(0, (len(prompts.walks), -1)).repeat_interleave(n, 0).flatten(0, 1)
                for f in image["deepstack_visual_embeds"]]  # fmt: skip
        where = torch.nn.functional.pad(image["visual_pos_masks"].repeat_interleave(n, 0), (0, T))
        hidden = self._run(
            embedded, self._positions(prompts, T), visual_pos_masks=where, deepstack_visual_embeds=deep, use_cache=False
        )
        return self._token_values(hidden[:, P - 1 : -1], ids_NT)


def new_policy(config: TinyPolicyConfig = POLICY) -> WalkPolicy:
    """An untrained policy that can learn to look within minutes: two of its weights are not those of transformers.

    In ``LOOK_HEADS`` heads of layer ``LOOK_LAYER`` queries equal keys, so a word attends to an image cell with the same
    content. The vision tower's position embeddings are scaled, so that a visual token can say where it is.
    """
    processor = build_processor(config)
    policy = WalkPolicy(build_model(config, processor), processor)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        attention = policy.text.layers[LOOK_LAYER].self_attn
        torch.nn.init.orthogonal_(attention.q_proj.weight)
        size = LOOK_HEADS * config.head_dim
        attention.k_proj.weight[:size] = attention.q_proj.weight[:size]
        policy.vision.pos_embed.weight.mul_(POSITION_SCALE)
    return policy
