"""AT-RL: credit for the clusters of tokens that look at the image.

OUR READING. Paper: "Credit Where It is Due: Cross-Modality Connectivity Drives Precise RL for MLLM Reasoning", arXiv
2602.11455. Its formulas and code are not public. Its abstract and summaries of it say: a token's connectivity is the
attention it places on visual patches, with attention sinks debiased. About 15 % of the tokens are perceptual anchors.
METIS clusters tokens by the similarity of their attention patterns. Each cluster's perceptual load becomes a weight,
A_AT(i, t) = W(C_k) A(i). Training on tokens of low connectivity alone collapses. We read that as follows, for one
response of n tokens:

    d_t   = image mass_t / (1 - sink mass_t)              connectivity in [0, 1]; the sink is the sequence's first token
    e_ts  = cosine of the attention profiles of t and s over the visual tokens, for the m nearest of each; and the least
            weight between neighbours in the text, so that the graph is connected
    C_k   = METIS partition into K parts of about equal size, K = min(max(round(n / 24), 2), 8) unless set
    l_k   = mean of d_t over C_k                          perceptual load
    W_k   = clip(l_k / mean of d_t, weight_min, weight_max), divided by its mean over the tokens
    A_it  = A_i W_k(t)

The weights of a response have mean one exactly. Dividing by the mean moves the bounds to [weight_min, weight_max] over
a number between the two. METIS makes parts of equal size. With 7 or 8 of them the most perceptual one holds about the
15 % that the paper calls anchors, so K goes up to 8. The bounds keep every token in the update ("linguistic
coherence").

``weighting=top`` keeps only the gradient of the ``anchor_share`` of highest d_t, ``weighting=rest`` only that of the
others. This is the paper's control, and its one claim that needs no hidden formula. These weights are 0 and 1, do not
have mean one, and need neither profiles nor METIS.

Assumes: attention of the rollout policy, without gradient, at the row that sampled y_t. A response of fewer than
2K tokens, or of more than 32,768 (METIS adds edge weights in 32 bits), is not cut. It has weight 1 and is counted in
``anchor_uncut_rows``. A response whose partition failed has weight 1, too. More than 1 % of failures stop the run.

Shape suffixes: B rows, T response tokens, n tokens of one response, m neighbours, K parts.
"""

import time
from dataclasses import dataclass

import torch

from sayo_verl.errors import SayoError
from sayo_verl.methods.base import Credit, CreditKind, Rules, blend, check_setting, distinct_layers, masked_mean
from sayo_verl.methods.region import select_tokens
from sayo_verl.methods.signals import Needs, Signals
from sayo_verl.metrics import AS_GRPO, Metric, Panel
from sayo_verl.probe.statistics import QUERY_ROWS, Statistic, StatisticsRequest

EPS = 1e-6  # of a share of attention
LEVELS = 1000  # weight of an edge between tokens of equal profiles; 1 is that of neighbours in the text
TOKENS_PER_PART, MOST_PARTS = 24, 8
FAILED_SHARE = 0.01
WEIGHTINGS = ("clusters", "top", "rest")
PIP = "pip install 'sayo-verl[anchor]'"


def connectivity(image_mass: torch.Tensor, sink_mass: torch.Tensor) -> torch.Tensor:
    """d_t: [B, T] in [0, 1] from masses [B, T]; attention on the image as a share of what does not go to the sink."""
    return (image_mass / (1 - sink_mass).clamp(min=EPS)).clamp(0.0, 1.0)


def edges(index: torch.Tensor, similarity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours of each token of one response and the weights of the edges: its nearest, and the token after it.

    Args:
        index: int64 [n, m] in -1 .. n - 1; -1 is no neighbour.
        similarity: [n, m] cosines.

    Returns:
        ``(index [n, m + 1], weight [n, m + 1])``, both int16. The weight of an edge is round(1000 cosine). METIS takes
        positive whole numbers only, so an edge whose weight is not positive is left out.
    """
    following = torch.arange(1, index.shape[0] + 1, device=index.device)[:, None]
    following[-1:] = -1
    weight = (LEVELS * similarity.clamp(-1.0, 1.0)).round()
    least = torch.ones_like(following)
    return torch.cat([index, following], -1).short(), torch.cat([weight.short(), least.short()], -1)


def cluster_weights(
    density: torch.Tensor, labels: torch.Tensor, weight_min: float, weight_max: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_k of each token.

    Args:
        density: [B, T] d_t; read where there is a label.
        labels: int64 [B, T], cluster of each token, -1: none.
        weight_min, weight_max: bounds before the weights are divided by their mean.

    Returns:
        ``(weight [B, T], load [B, K])``; the weight is 1 without a label and has mean one over each row's labelled
        tokens. The load of an empty cluster is -1.
    """
    on = labels >= 0
    label = labels.clamp(min=0)
    kept = torch.where(on, density, torch.zeros_like(density))
    size_BK = torch.zeros(len(labels), int(label.max()) + 1 if label.numel() else 1, dtype=density.dtype)
    size_BK = size_BK.to(density.device).scatter_add(1, label, on.to(density.dtype))
    load_BK = torch.zeros_like(size_BK).scatter_add(1, label, kept) / size_BK.clamp(min=1)
    mean_B1 = masked_mean(kept, on)[:, None]
    weight = (load_BK / mean_B1.clamp(min=EPS)).clamp(weight_min, weight_max).gather(1, label)
    total_B1 = masked_mean(weight, on)[:, None]
    # All 0 if no token looks at the image and weight_min is 0: the clusters are then equal.
    weight = torch.where(on & (total_B1 > 0), weight / total_B1.clamp(min=EPS), torch.ones_like(weight))
    return weight, load_BK.masked_fill(size_BK == 0, -1.0)


@dataclass(frozen=True)
class AnchorMethod:
    """``algorithm.adv_estimator=attn_anchor``.

    Attributes:
        strength: weights are 1 + strength (weight - 1); 0 is GRPO. [ours]
        layers: decoder layers to average over; each adds the memory and time of its attention profiles. [ours]
        query_row: ``predicting``, the row that sampled y_t; or ``input`` (as SAYO), which samples the next. [ours]
        neighbours: m, edges of each token in the graph. [A: similarity of patterns] [ours: the number]
        parts: K, clusters of a response; 0 is one for every 24 tokens, 2 to 8. [A: METIS] [ours: the number]
        weight_min: smallest weight of a cluster, before the weights of a response are divided by their mean. [ours]
        weight_max: largest weight of a cluster, before the weights of a response are divided by their mean. [ours]
        weighting: ``clusters`` weights tokens by cluster; ``top`` trains the tokens of highest connectivity alone;
            ``rest`` trains the others alone, the paper's control. [A]
        anchor_share: share of tokens that ``top`` keeps. [A: about 15 %]
        seed: seed of METIS. [ours]
        time_limit: seconds that METIS may take for one batch of responses in a worker. [ours]
        processes: number of processes that cut responses; 0 is one per core of the trainer's machine, at most 64.
            [ours]
    """

    strength: float = 1.0
    layers: tuple[int, ...] = (-1,)
    query_row: str = "predicting"
    neighbours: int = 8
    parts: int = 0
    weight_min: float = 0.5
    weight_max: float = 2.0
    weighting: str = "clusters"
    anchor_share: float = 0.15
    seed: int = 0
    time_limit: float = 20.0
    processes: int = 0
    name = "attn_anchor"
    reference = ("our reading of AT-RL", "arXiv 2602.11455")
    metrics = (
        Panel(
            "Anchor share",
            "share of tokens",
            (
                Metric(
                    "anchor_share",
                    "anchors",
                    0,
                    1,
                    "share of tokens",
                    live="anchor share",
                    note="Tokens in the most perceptual cluster of their response.",
                ),
            ),
            guide=(0.15, "about the paper's"),
        ),
        Panel(
            "Anchor weights",
            "factor on the advantage",
            band=(
                Metric("anchor_weight/min", "anchor weight, smallest", 0),
                Metric("anchor_weight/max", "anchor weight, largest", 0, live="largest weight"),
            ),
            guide=AS_GRPO,
        ),
        Panel(
            "Clusters", "mean per response", (Metric("anchor_clusters/mean", "clusters per response", 1, decimals=1),)
        ),
        Panel(
            "Connectivity $d$",
            "share of attention",
            (Metric("anchor_density/mean", "connectivity d", 0, 1, "share of attention"),),
        ),
        Metric("anchor_weight/std", "anchor weight, standard deviation", 0),
        Metric("anchor_cluster_size/mean", "tokens per cluster", 1, decimals=1),
        Metric("anchor_share_of_density", "anchors", 0, 1, "share of connectivity"),
        Metric("partition_seconds", "graph partitioning", 0, unit="seconds"),
        Metric("partition_failed_rows", "rows whose partition failed", 0, decimals=1),
        Metric("anchor_uncut_rows", "rows that were not cut", 0, decimals=1),
    )

    def __post_init__(self) -> None:
        check_setting("anchor", self, self.rules())

    def rules(self) -> Rules:
        """What each setting must be."""
        return {
            "strength": (0 <= self.strength <= 1, "a number in [0, 1]"),
            "layers": distinct_layers(self.layers),
            "query_row": (self.query_row in QUERY_ROWS, " or ".join(QUERY_ROWS)),
            "neighbours": (1 <= self.neighbours <= 32, "a whole number in 1 .. 32"),
            "parts": (self.parts == 0 or 2 <= self.parts <= 64, "0 or a whole number in 2 .. 64"),
            "weight_min": (0 <= self.weight_min <= 1, "a number in [0, 1]"),
            "weight_max": (1 <= self.weight_max < float("inf"), "a finite number >= 1"),
            "weighting": (self.weighting in WEIGHTINGS, " or ".join(WEIGHTINGS)),
            "anchor_share": (0 < self.anchor_share < 1, "a number in (0, 1)"),
            "seed": (0 <= self.seed < 2**31, "a whole number of 31 bits"),
            "time_limit": (0 < self.time_limit <= 600, "seconds in (0, 600]"),
            "processes": (0 <= self.processes <= 1024, "a whole number in 0 .. 1024"),
        }

    @property
    def gives(self) -> frozenset[CreditKind]:
        return frozenset({"token"} if self.strength else ())

    def _statistic(self, name: str) -> Statistic:
        size = self.neighbours if name.startswith("neighbour") else 0
        return Statistic(name, layers=self.layers, query_row=self.query_row, size=size)

    def needs(self) -> Needs:
        clusters = self.weighting == "clusters"
        names = ["image_mass", "sink_mass", *(["neighbour_index", "neighbour_similarity"] if clusters else [])]
        packages = (("pymetis", PIP), ("pebble", PIP)) if clusters else ()
        return Needs(StatisticsRequest(tuple(map(self._statistic, names))), packages=packages)

    def credit(self, signals: Signals) -> Credit:
        mask, eligible = signals.response_mask.bool(), signals.eligible_rows(boxes=False)
        tokens = mask & eligible[:, None]
        density = connectivity(signals[self._statistic("image_mass")], signals[self._statistic("sink_mass")])
        density = torch.where(tokens, density, torch.zeros_like(density))
        metrics = {"anchor_density/mean": float(density[tokens].mean())} if tokens.any() else {}
        if self.weighting == "clusters":
            labels, of_partition = self._labels(signals, tokens)
            weight, load = cluster_weights(density, labels, self.weight_min, self.weight_max)
            metrics |= of_partition | _shares(density, labels, load)
        else:
            top = select_tokens(density, tokens, self.anchor_share)
            kept = top if self.weighting == "top" else tokens & ~top
            weight = torch.where(tokens, kept.to(density.dtype), torch.ones_like(density))
            if tokens.any():
                metrics["anchor_share"] = float(top.sum() / tokens.sum())
                metrics["anchor_share_of_density"] = float(density[top].sum() / density.sum().clamp(min=EPS))
        if tokens.any():
            metrics |= {
                "anchor_weight/min": float(weight[tokens].min()),
                "anchor_weight/max": float(weight[tokens].max()),
                "anchor_weight/std": float(weight[tokens].std(correction=0)),
            }
        return Credit(token_weight=blend(weight, self.strength) if self.gives else None, metrics=metrics)

    def _labels(self, signals: Signals, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Cluster of each token, int64 [B, T], -1 in rows that are not cut; and what that took.

        Raises:
            SayoError: A03 for a neighbour that is no token, A15 without METIS, A16 when METIS failed on more than 1 %
                of the responses that were to be cut.
        """
        from sayo_verl.metis import MAX_TOKENS, partition_graphs

        index = signals[self._statistic("neighbour_index")]
        similarity = signals[self._statistic("neighbour_similarity")]
        rows: list[tuple[int, torch.Tensor, int]] = []
        start = time.perf_counter()
        near = []
        for b in tokens.any(-1).nonzero().flatten().tolist():
            place_n = tokens[b].nonzero().flatten()
            n = place_n.numel()
            parts = self.parts or min(max(round(n / TOKENS_PER_PART), 2), MOST_PARTS)
            if n < 2 * parts or n > MAX_TOKENS:
                continue
            # tokens may have been taken out of the mask since the probe counted them
            number_T = torch.full((tokens.shape[1] + 1,), -1, device=tokens.device)
            number_T[place_n] = torch.arange(n, device=tokens.device)
            rows.append((b, place_n, parts))
            place_nm = index[b, place_n].long()
            if (place_nm != index[b, place_n]).any() or place_nm.max() >= tokens.shape[1]:
                raise SayoError(
                    "A03",
                    "a neighbour is no token of the response",
                    where=f"attn_anchor, row {b}",
                    got=f"up to {float(index[b, place_n].max())}",
                    wanted=f"whole numbers below {tokens.shape[1]}, or -1",
                    fix="this is a defect of the probe; report it",
                )
            index_nm, weight_nm = edges(number_T[place_nm], similarity[b, place_n])
            near.append((index_nm.cpu().numpy(), weight_nm.cpu().numpy()))
        cut = partition_graphs(
            near,
            [parts for *_, parts in rows],
            seed=self.seed,
            time_limit=self.time_limit,
            processes=self.processes or None,
        )
        labels = torch.full(tokens.shape, -1, dtype=torch.int64, device=tokens.device)
        failed = sum(found is None for found in cut)
        if failed > FAILED_SHARE * len(cut):
            raise SayoError(
                "A16",
                "METIS failed on too many responses",
                where="attn_anchor",
                got=f"{failed} of {len(cut)}",
                wanted=f"at most {FAILED_SHARE:.0%}",
                fix="raise algorithm.attn.anchor.time_limit, or lower neighbours. METIS runs in spawned processes, so "
                "a script of your own needs `if __name__ == '__main__':`. If neither helps, report the batch",
            )
        for (b, place_n, _), found in zip(rows, cut, strict=True):
            if found is not None:
                labels[b, place_n] = torch.from_numpy(found).to(labels.device)
        return labels, {
            "partition_seconds": time.perf_counter() - start,
            "partition_failed_rows": float(failed),
            "anchor_uncut_rows": float(int(tokens.any(-1).sum()) - len(rows)),
        }


def _shares(density: torch.Tensor, labels: torch.Tensor, load: torch.Tensor) -> dict[str, float]:
    """Metrics of the clusters, and of the most perceptual one of each response: the paper's anchors."""
    on = labels >= 0
    if not on.any():
        return {}
    cut = on.any(-1)
    anchors = on & (labels == load.argmax(-1, keepdim=True))
    clusters_B = (load >= 0).sum(-1)[cut]
    share_B = density.masked_fill(~anchors, 0).sum(-1) / density.masked_fill(~on, 0).sum(-1).clamp(min=EPS)
    return {
        "anchor_clusters/mean": float(clusters_B.float().mean()),
        "anchor_cluster_size/mean": float((on.sum(-1)[cut] / clusters_B).float().mean()),
        "anchor_share": float(anchors.sum() / on.sum()),
        "anchor_share_of_density": float(share_B[cut].mean()),
    }
