"""Score the credit of methods, and statistics of tokens, on rollouts whose truth is known. Nothing is trained.

A method's credit is its advantages, from the package's own core (``sayo_verl.methods.advantages``), so reward terms,
token and trajectory factors and bonuses all count. Where a token's credit lies is the size of its advantage. Responses
of a group without contrast have no credit and are left out.

Shape suffixes: B responses, T tokens of a response (padded on the right).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.yardstick import scores
from benchmarks.yardstick.scores import Truth
from sayo_verl.estimates import Estimate, dependence
from sayo_verl.methods import Credit, Method, Signals, advantages


@dataclass(frozen=True)
class Known:
    """Responses of one policy with what was measured and what is true.

    Attributes:
        signals: what methods read.
        truth: of the tokens.
        reward: [B], the task reward.
        own_region: decoder layer -> [B, T], attention of the row that sampled the token on the region that the token
            depends on, as a share of the attention on the image; read at perceptual tokens.
    """

    signals: Signals
    truth: Truth
    reward: torch.Tensor
    own_region: Mapping[int, np.ndarray]


def credit_of(method: Method | None, known: Known) -> tuple[Credit, np.ndarray]:
    """A method's credit (None: GRPO), and the advantages [B, T] that the package's core makes of it."""
    credit = Credit() if method is None else method.credit(known.signals)
    advantage_BT, _ = advantages(known.reward, known.signals.response_mask, known.signals.uid, credit)
    return credit, advantage_BT.double().numpy()


def of_credit(credit: Credit, advantage_BT: np.ndarray, known: Known) -> dict[str, Estimate]:
    """Scores of what ``credit_of`` returns by name, see ``benchmarks.yardstick.scores``.

    ``separation`` (also of each half of a response), ``precision``, ``blame``, ``afterwards`` and ``control`` (permuted
    credit) are always there.
    ``trajectory`` needs a trajectory factor, ``look`` a reward term. ``look`` takes the layer that looks best.
    """
    truth = known.truth
    has_credit_B = (np.where(truth.mask, advantage_BT, 0.0) != 0).any(1)
    size_BT, counted = np.abs(advantage_BT[has_credit_B]), rows(truth, has_credit_B)
    found = {
        "separation": scores.separation(size_BT, counted),
        "first half": scores.separation(size_BT, scores.half(counted, late=False)),
        "second half": scores.separation(size_BT, scores.half(counted, late=True)),
        "precision": scores.precision(size_BT, counted),
        "control": scores.separation(scores.permuted(size_BT, counted), counted),
        "blame": scores.blame(advantage_BT, truth),
        "afterwards": scores.afterwards(advantage_BT, truth),
    }
    if credit.trajectory_weight is not None:
        found["trajectory"] = scores.trajectory(credit.trajectory_weight.double().numpy(), truth)
    for term in credit.terms:
        reward_B = np.where(term.valid.numpy(), term.value.double().numpy(), np.nan)
        layer = best_layer(known)
        name = "look" if len(credit.terms) == 1 else f"look of {term.name}"
        found[name] = scores.look(reward_B, known.own_region[layer], truth)
    return found


def of_values(values: np.ndarray, truth: Truth) -> dict[str, Estimate]:
    """Scores of a statistic as if it were a token factor. ``values``: [B, T]."""
    return {
        "separation": scores.separation(values, truth),
        "first half": scores.separation(values, scores.half(truth, late=False)),
        "second half": scores.separation(values, scores.half(truth, late=True)),
        "precision": scores.precision(values, truth),
        "error": scores.error(values, truth),
        "control": scores.separation(scores.permuted(values, truth), truth),
    }


def token_statistics(signals: Signals) -> dict[str, np.ndarray]:
    """What was measured of each token, by name: [B, T]. Statistics of several values per token are left out."""
    found = {"entropy": signals.entropy, "surprise": -signals.log_probs}
    for statistic, values in signals.statistics.items():
        if values.ndim == 2:
            layers = "" if statistic.spec.source == "hidden" else ", ".join(map(str, statistic.layers))
            row = ", row of the token" if statistic.query_row == "input" else ""
            found[f"{statistic.name}{f', layer {layers}' if layers else ''}{row}"] = values
    out = {name: values.double().numpy() for name, values in found.items()}
    for intervention, changed in signals.counterfactuals.items():
        name = "dependence on the image" if len(signals.counterfactuals) == 1 else f"dependence, {intervention.key}"
        out[name] = dependence((signals.log_probs - changed).double().numpy())
    return out


def best_layer(known: Known) -> int:
    """The layer with the highest mean attention on the tokens' own regions."""
    looks_BT = known.truth.mask & known.truth.perceptual
    return max(known.own_region, key=lambda layer: float(known.own_region[layer][looks_BT].mean()))


def rows(truth: Truth, kept: np.ndarray) -> Truth:
    """The truth of some responses. ``kept``: bool [B]."""
    prompt = [name for name, keep in zip(truth.prompt, kept, strict=True) if keep]
    arrays = {name: getattr(truth, name)[kept] for name in ("mask", "perceptual", "right", "correct")}
    return dataclasses.replace(truth, prompt=prompt, **arrays)
