"""Measure statistics of a response, and its log-probs after a changed image, in one teacher-forced pass each.

The pass takes the prompt's ids and the response's own ids, which are never tokenised again. Memory is linear in tokens:
queries and keys are reduced layer by layer, and logits exist for a few tokens at a time.

Shape suffixes: S tokens, P prompt tokens, T response tokens, W words, V visual tokens, N entries of the vocabulary,
D hidden size.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sayo_verl.errors import Rule, raise_first
from sayo_verl.look.loaded import LoadedModel
from sayo_verl.look.prompt import Prompt, check_context
from sayo_verl.methods.signals import Signals
from sayo_verl.probe.measure import Measurement
from sayo_verl.probe.plan import ChatTokens, RowPlan, plan_row
from sayo_verl.probe.statistics import FAST_LSE, Statistic, StatisticsRequest, check_lse_path
from sayo_verl.probe.taps import (
    ForwardTap,
    asked_layers,
)
from sayo_verl.vision.control import filled_tokens
from sayo_verl.vision.intervention import Intervention, Pixels, intervene, prompt_key

LOGITS = 2**24  # entries [t, N] of logits at once: 64 MiB of float32


@dataclass(frozen=True)
class Measured:
    """Statistics of one response.

    Attributes:
        statistics: those of the request, float32 [T], [T, W] or [V] for ``patch_sums``.
        entropy: float32 [T] in nats, of the distribution that sampled token t, at temperature 1.
        log_probs: float32 [T] in nats.
        counterfactuals: each intervention -> [T] as ``log_probs``, of the same tokens after the changed image.
        image_tokens, region_tokens: of the prompt.
    """

    statistics: Mapping[Statistic, torch.Tensor]
    entropy: torch.Tensor
    log_probs: torch.Tensor
    counterfactuals: Mapping[Intervention, torch.Tensor]
    image_tokens: int
    region_tokens: int


def signals(measured: Sequence[Measured], uid: Sequence[str], correct: Sequence[float] | None) -> Signals:
    """Several responses as the batch that a method's ``credit`` reads, padded on the right with zeros.

    Args:
        measured: of the same request.
        uid: names the prompt of each.
        correct: ``acc`` of each; None if no method needs it.
    """
    lengths = [len(m.log_probs) for m in measured]

    def padded(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)

    of_tokens = [s for s in measured[0].statistics if s.name != "patch_sums"]  # which is per visual token
    return Signals(
        response_mask=padded([torch.ones(n) for n in lengths]),
        entropy=padded([m.entropy for m in measured]),
        log_probs=padded([m.log_probs for m in measured]),
        statistics={s: padded([m.statistics[s] for m in measured]) for s in of_tokens},
        image_tokens=torch.tensor([float(m.image_tokens) for m in measured]),
        region_tokens=torch.tensor([float(m.region_tokens) for m in measured]),
        is_padding=torch.zeros(len(measured), dtype=torch.bool),
        uid=tuple(uid),
        counterfactuals={i: padded([m.counterfactuals[i] for m in measured]) for i in measured[0].counterfactuals},
        correct=None if correct is None else torch.tensor([float(c) for c in correct]),
    )


class Measurer(LoadedModel):
    """A loaded model that measures responses."""

    @torch.no_grad()
    def measure(
        self,
        prompt: Prompt,
        response_ids: Sequence[int],
        request: StatisticsRequest,
        *,
        interventions: Sequence[Intervention] = (),
    ) -> Measured:
        """Measure statistics of the probe's catalogue, and the response's log-probs after each intervention.

        The changed images are those of step 0 in training. Each takes a pass of its own.

        Raises:
            SayoError: W07 to W10 for a response that cannot be measured, and what ``Measurement`` and ``intervene``
                raise.
        """
        response_T = self._response(prompt, response_ids)
        names = {s.name for s in request.statistics}
        plan = self._plan(
            prompt,
            response_T,
            coverage=request.coverage,
            n_boxes=max((s.size for s in request.statistics if s.name == "box_mass"), default=0),
            chat=ChatTokens.of(self.processor.tokenizer, self.family)
            if names & {"system_mass", "question_mass"}
            else None,
        )
        check_lse_path(request.path, packed=True, ranks=1, flash=self.kernel == "flash_attention_2")
        numbers = asked_layers(self.model, request.layers, where="the layers of a statistic")
        measurement = Measurement(request, [plan], numbers, packed=True, device=self.device)
        attention = {numbers[n] for s in request.statistics if s.spec.source != "hidden" for n in s.layers}
        hidden = any(s.spec.source == "hidden" for s in request.statistics)
        read_hidden = measurement.read_hidden if hidden else None
        lse = request.path == FAST_LSE
        with ForwardTap(self.model, sorted(attention), measurement.read, read_hidden, with_lse=lse):
            log_probs, entropy = self._token_values(prompt, response_T)
        results = measurement.finish() if request.statistics else {}
        changed = {}
        for i in interventions:
            if i.of_boxes and not any(prompt.boxes):  # nothing would change
                changed[i] = log_probs.cpu()
            else:
                changed[i] = self._token_values(prompt, response_T, self._changed(prompt, i, request.coverage))[0].cpu()
        return Measured(
            {s: results[s.key][0].cpu() for s in request.statistics},
            entropy.cpu(),
            log_probs.cpu(),
            changed,
            plan.image_columns.numel(),
            plan.region_tokens,
        )

    def _response(self, prompt: Prompt, ids: Sequence[int]) -> torch.Tensor:
        """int64 [T].

        Raises:
            SayoError: W07 for an empty response, W08 for one of special tokens alone, W09 for one with a placeholder of
                visual tokens, W10 for an id that the model does not have, W05 for one that does not fit the context.
        """
        tokenizer, size = self.processor.tokenizer, self.model.get_input_embeddings().num_embeddings
        special = set(tokenizer.all_special_ids)
        where = f"the response to {prompt.seen.where}"
        fix = "give another response, or raise --max-new-tokens"
        found = sorted(set(ids) & set(self.placeholders))
        outside = [n for n in ids if not 0 <= n < size]
        raise_first(
            [
                Rule("W07", len(ids) == 0, "the response is empty", where, fix),
                Rule("W10", bool(outside), "the response has tokens of another model", where,
                     "give ids of the model's own tokenizer", got=outside[:5], wanted=f"0 to {size - 1}"),
                Rule("W09", bool(found), "the response has placeholders of images, which have no pixels", where,
                     "remove them", got=tokenizer.convert_ids_to_tokens(found)),
                Rule("W08", all(n in special for n in ids), "the response has special tokens only", where, fix,
                     got=tokenizer.decode(list(ids))),
            ]
        )  # fmt: skip
        shorter = "give a shorter response, a shorter question, or smaller or fewer images"
        check_context(self.config, prompt.seen, len(prompt.ids), len(ids), fix=shorter)
        return torch.tensor(list(ids), dtype=torch.int64)

    def _plan(
        self,
        prompt: Prompt,
        response_T: torch.Tensor,
        *,
        border: bool = False,
        coverage: float | None = None,
        n_boxes: int = 0,
        chat: ChatTokens | None = None,
    ) -> RowPlan:
        plan = plan_row(
            torch.cat([prompt.ids, response_T]),
            len(response_T),
            image_token_id=self.config.image_token_id,
            images=prompt.tiles,
            boxes=prompt.boxes,
            coverage=self.coverage if coverage is None else coverage,
            where=prompt.seen.where,
            n_boxes=n_boxes,
            chat=chat,
        )
        if not border:
            return plan
        border_S = torch.zeros(plan.length, dtype=torch.bool)
        border_S[plan.image_columns] = torch.from_numpy(prompt.seen.border)
        return dataclasses.replace(plan, keys={**plan.keys, "border": border_S})

    def _hidden(self, prompt: Prompt, ids_S: torch.Tensor, changed: Mapping[str, torch.Tensor] | None = None) -> Any:
        """Last hidden states [S, D] of the prompt and some tokens after it."""
        inputs: dict[str, Any] = dict(changed or prompt.inputs)
        if "mm_token_type_ids" in inputs:
            more = len(ids_S) - inputs["mm_token_type_ids"].shape[1]
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, more))
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        ids = ids_S[None].to(self.device)
        return self.model.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs
        ).last_hidden_state[0]

    def _token_values(
        self, prompt: Prompt, response_T: torch.Tensor, changed: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob and entropy [T] of the distributions that sampled the response, at temperature 1."""
        P, T = len(prompt.ids), len(response_T)
        hidden_TD = self._hidden(prompt, torch.cat([prompt.ids, response_T]), changed)[P - 1 : P + T - 1]
        head = self.model.get_output_embeddings()
        response_T = response_T.to(self.device)
        rows, log_probs, entropies = max(LOGITS // head.weight.shape[0], 1), [], []
        for first in range(0, T, rows):
            log_p_tN = head(hidden_TD[first : first + rows]).float().log_softmax(-1)
            log_probs.append(log_p_tN.gather(-1, response_T[first : first + rows, None])[:, 0])
            entropies.append(-(log_p_tN.exp() * log_p_tN).sum(-1))
        return torch.cat(log_probs), torch.cat(entropies)

    def _changed(self, prompt: Prompt, intervention: Intervention, coverage: float) -> dict[str, torch.Tensor]:
        where, key = prompt.seen.where, prompt_key(prompt.ids, 0)
        return intervene(
            prompt.inputs,
            intervention,
            Pixels.of(self.processor, self.family.geometry),
            tiles=prompt.tiles,
            region=filled_tokens(intervention, prompt.boxes, prompt.tiles, coverage, key=key, where=where),
            key=key,
            where=where,
        )
