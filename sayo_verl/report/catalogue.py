"""What is shown of a run, in one list. Figures, tables and the live view read it; none keeps a list of its own.

A method is one section. Common panels and rows are always there, so that a run without them says "not measured"; those
of a method appear where it was measured. What a method of one's own logs below ``sayo/`` is shown under its own name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from sayo_verl.report.runs import UNKNOWN, Run

PREFIX = "sayo/"
MIX = "attn_mix"
MOST_UNLISTED_LIVE = 2  # of a method that is not listed, in the live view


@dataclass(frozen=True)
class Metric:
    """One number per training step.

    Attributes:
        name: in metrics.jsonl.
        label: in a table, with the unit.
        decimals: in a table.
        line: what its line is called where a panel holds several.
        live: what the live view calls it; empty: not shown there.
        unless_zero: left out of a table where it was zero in every step.
    """

    name: str
    label: str
    decimals: int = 3
    line: str = "training"
    live: str = ""
    unless_zero: bool = False


@dataclass(frozen=True)
class Panel:
    """One small diagram.

    Attributes:
        title, unit: above it and on its vertical axis.
        metrics: a line each: solid, then dashed.
        band: the lower and the upper end of a shaded range.
        guide: a level to compare with, and what it means.
        limits: ends of the vertical axis; None: as the values ask for.
    """

    title: str
    unit: str
    metrics: tuple[Metric, ...] = ()
    band: tuple[Metric, Metric] | None = None
    guide: tuple[float, str] | None = None
    limits: tuple[float | None, float | None] = (None, None)

    @property
    def every(self) -> tuple[Metric, ...]:
        return self.metrics + (self.band or ())


@dataclass(frozen=True)
class Section:
    """What belongs together: a method's numbers, or what every run has.

    Attributes:
        panels: of the figure; their metrics are rows of the table too.
        rows: of the table only.
        estimator: the method's ``algorithm.adv_estimator``.
        paper: the method's name and its paper.
        quiet: names of metrics that are logged and shown nowhere.
    """

    panels: tuple[Panel, ...] = ()
    rows: tuple[Metric, ...] = ()
    estimator: str = ""
    paper: tuple[str, str] = ("", "")
    quiet: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (*chain.from_iterable(panel.every for panel in self.panels), *self.rows)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(metric.name for metric in self.metrics) | {PREFIX + name for name in self.quiet}


# What verl logs here is the reward that advantages are made of: the task reward, less the KL penalty if that is in the
# reward, and the terms that a method adds.
REWARD = Metric("critic/rewards/mean", "reward", live="reward")
ACCURACY = Metric("sayo/accuracy/mean", "accuracy", live="accuracy")
AS_GRPO, NO_PREFERENCE = (1.0, "as in GRPO"), (0.0, "no preference")

# fmt: off
COMMON = Section(
    panels=(
        Panel("Total reward", "mean, with method's terms", (REWARD,)),
        Panel("Accuracy", "share of answers", (ACCURACY,), limits=(0, 1)),
        Panel("Entropy", "nats per token", (Metric("actor/entropy", "entropy (nats per token)"),), limits=(0, None)),
        Panel("Response length", "tokens", (Metric("response_length/mean", "response length (tokens)", 1),)),
    ),
    rows=(Metric("sayo/format/mean", "format"),),
)

REGION = Section(
    estimator="attn_region",
    paper=("SAYO", "arXiv 2602.08241"),
    panels=(
        Panel("Region reward $r_v$", "mean, from -1 to 1", (
            Metric("sayo/region_reward/mean", "region reward r_v", live="r_v"),
        ), guide=NO_PREFERENCE),
        Panel("Target attention $R_a$", "mean, from 0 to 1", (
            Metric("sayo/target_attention/mean", "target attention R_a, high-entropy tokens", live="R_a"),
        ), guide=(0.5, "no preference")),
        # A mean over more tokens raises R_a, so tokens are compared one by one.
        Panel("$R_a$ of single tokens", "mean over tokens", (
            Metric("sayo/token_target_attention/mean", "R_a of single tokens, high-entropy tokens",
                   line="high-entropy tokens"),
            Metric("sayo/token_target_attention_all/mean", "R_a of single tokens, all tokens", line="all tokens"),
        ), guide=(0.5, "no preference")),
    ),
    rows=(
        Metric("sayo/selected_tokens/mean", "high-entropy tokens per response", 1),
        Metric("sayo/image_mass/mean", "attention mass on the image"),
        Metric("sayo/region_token_weight/mean", "token weight in rows with a region, mean"),
        Metric("sayo/rows_with_region_share", "share of rows with a region"),
    ),
    quiet=("region_reward/std", "region_mass/mean", "selected_token_share"),
)

DUAL = Section(
    estimator="attn_dual",
    paper=("VGPO", "arXiv 2604.09349"),
    panels=(
        Panel("Visual score $S$", "cosine (or attention mass)", (
            Metric("sayo/visual_score/mean", "visual score S"),
        )),
        Panel("Late to early score", "ratio of their means", (
            Metric("sayo/late_early_visual_score", "late to early visual score (ratio)"),
        ), guide=(1.0, "late as early")),
        Panel("Gate rate", "share of tokens", (
            Metric("sayo/dual_gate_rate", "tokens through the gate (share)", live="gate rate"),
        )),
        Panel("Token factor spread", "standard deviation", (
            Metric("sayo/dual_token_factor/std", "token factor, standard deviation", live="token factor std"),
        )),
        Panel("Trajectory factor", "factor on the advantage", (
            Metric("sayo/dual_trajectory_factor/mean", "trajectory factor, mean", line="mean"),
        ), band=(
            Metric("sayo/dual_trajectory_factor/min", "trajectory factor, smallest"),
            Metric("sayo/dual_trajectory_factor/max", "trajectory factor, largest"),
        ), guide=AS_GRPO),
    ),
)

ANCHOR = Section(
    estimator="attn_anchor",
    paper=("our reading of AT-RL", "arXiv 2602.11455"),
    panels=(
        Panel("Anchor share", "share of tokens", (
            Metric("sayo/anchor_share", "anchors (share of tokens)", live="anchor share"),
        ), guide=(0.15, "about the paper's")),
        Panel("Anchor weights", "factor on the advantage", band=(
            Metric("sayo/anchor_weight/min", "anchor weight, smallest"),
            Metric("sayo/anchor_weight/max", "anchor weight, largest", live="largest weight"),
        ), guide=AS_GRPO),
        Panel("Clusters", "mean per response", (
            Metric("sayo/anchor_clusters/mean", "clusters per response", 1),
        )),
        Panel("Connectivity $d$", "share of attention", (
            Metric("sayo/anchor_density/mean", "connectivity d (share of attention)"),
        )),
    ),
    rows=(
        Metric("sayo/anchor_weight/std", "anchor weight, standard deviation"),
        Metric("sayo/anchor_cluster_size/mean", "tokens per cluster", 1),
        Metric("sayo/anchor_share_of_density", "anchors (share of connectivity)"),
        Metric("sayo/partition_seconds", "graph partitioning (seconds)"),
        Metric("sayo/partition_failed_rows", "rows whose partition failed", 1),
        Metric("sayo/anchor_uncut_rows", "rows that were not cut", 1),
    ),
)

FAITHFUL = Section(
    estimator="attn_faithful",
    paper=("our reading of Faithful-MR1", "arXiv 2605.22072"),
    panels=(
        Panel("Faithful reward", "mean, from -1 to 1", (
            Metric("sayo/faithful_reward/mean", "faithful reward", line="reward", live="faithful reward"),
            Metric("sayo/faithful_ratio/mean", "faithful ratio F, before the gate", line="$F$, before the gate"),
        ), guide=NO_PREFERENCE),
        Panel("Causal effect $k$", "nats per token", (
            Metric("sayo/counterfactual_effect/mean", "counterfactual effect k (nats per token)", live="effect"),
        ), limits=(0, None)),
        Panel("Causal attention", "share of attention", (
            Metric("sayo/causal_attention/mean", "attention mass, weighted by effect", line="weighted by effect"),
            Metric("sayo/causal_attention_all_tokens/mean", "attention mass, all tokens", line="all tokens"),
        )),
    ),
    rows=(
        Metric("sayo/faithful_gate_rate", "rows through the gate (share)"),
        Metric("sayo/counterfactual_effect/share_above_0.1", "tokens with an effect above 0.1 (share)"),
        Metric("sayo/faithful_rows_share", "share of rows that can carry the reward"),
    ),
    quiet=("faithful_reward/std",),
)

ANY_METHOD = Section(
    panels=(
        Panel("Mean weight", "factor on the advantage", (
            Metric("sayo/token_weight/mean", "mean weight of tokens", line="tokens"),
            Metric("sayo/trajectory_weight/mean", "mean weight of trajectories", line="trajectories"),
        ), guide=(1.0, "size of the step kept")),
    ),
    rows=(
        Metric("sayo/neutral_rows/padding", "neutral rows: padding", 1, unless_zero=True),
        Metric("sayo/neutral_rows/masked", "neutral rows: no token left", 1, unless_zero=True),
        Metric("sayo/neutral_rows/no_image", "neutral rows: no image", 1, unless_zero=True),
        Metric("sayo/neutral_rows/no_box", "neutral rows: no box", 1, unless_zero=True),
        Metric("sayo/probe_share_of_log_prob", "probe's share of the log-prob pass"),
        Metric("sayo/counterfactual_seconds", "counterfactual pass (seconds)"),
        Metric("sayo/credit_wait_seconds", "waiting for the method's credit (seconds)"),
        Metric("sayo/advantage_seconds", "advantages (seconds)"),
    ),
    quiet=("probe_seconds", "credit_seconds"),
)
# fmt: on

METHODS = (REGION, DUAL, ANCHOR, FAITHFUL)
SECTIONS = (COMMON, *METHODS, ANY_METHOD)
_LISTED = frozenset(chain.from_iterable(section.names for section in SECTIONS))


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """The common panels, then those of which any of the runs measured something."""
    measured = {name for run in runs for name in run.series if run.training(name)}
    listed = [
        panel
        for section in SECTIONS
        for panel in section.panels
        if section is COMMON or measured & {metric.name for metric in panel.every}
    ]
    return listed + [Panel(metric.label, "as logged", (metric,)) for metric in _unlisted(measured)]


def rows_of(run: Run) -> list[Metric]:
    """The common rows, then those that the run measured; counts of neutral rows only if there were any."""
    measured = {name for name in run.series if run.training(name)}
    listed = [m for s in SECTIONS for m in s.metrics if s is COMMON or m.name in measured]
    kept = [m for m in listed if not m.unless_zero or any(value != 0 for _, value in run.training(m.name))]
    return kept + _unlisted(measured)


def headlines(seen: Iterable[str]) -> list[Metric]:
    """What the live view shows of a run that has logged these names: the common numbers, then each method's own."""
    seen = set(seen)
    listed = [m for s in SECTIONS for m in s.metrics if m.live and (s is COMMON or m.name in seen)]
    return listed + _unlisted(seen)[:MOST_UNLISTED_LIVE]


def estimator_of(run: Run) -> str:
    """``"attn_region: SAYO, arXiv 2602.08241"``; the bare name where no paper is known to this list."""
    papers = {section.estimator: section.paper for section in METHODS} | {"grpo": ("GRPO", "arXiv 2402.03300")}
    if run.estimator == UNKNOWN:
        return "estimator unknown"
    if run.estimator in papers:
        return f"{run.estimator}: {', '.join(papers[run.estimator])}"
    parts = [section.paper[0] for section in METHODS if section.names & run.series.keys()]
    if run.estimator == MIX and parts:
        # run.json does not hold the composed config: the metrics tell what took part.
        return f"{MIX}: {' + '.join(parts)}{' + others' if _unlisted(run.series) else ''}"
    return run.estimator


def _unlisted(names: Iterable[str]) -> list[Metric]:
    """Metrics below ``sayo/`` that no section knows: those of a method of one's own."""
    own = sorted(name for name in names if name.startswith(PREFIX) and name not in _LISTED)
    return [Metric(name, short := name.removeprefix(PREFIX), live=short) for name in own]
