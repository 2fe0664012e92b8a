"""What the statistics must be: from transformers' own eager attention in float64, one row at a time.

Written apart from ``sayo_verl.probe``: whole attention matrices are kept, turns are found by the text that was put into
them, and nothing is packed, chunked or gathered.

Shape suffixes: S tokens of one row, T its response tokens, L layers, H query heads, V visual tokens of the row, D
hidden size.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.engine_rows import QUESTION, SYSTEM
from support.family_models import require_own_forwards
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

IMAGE_LINE = "</img>"  # InternVL's chat template ends an image with a newline, which is text of the turn
ROW_OFFSET = {"input": 0, "predicting": -1}  # of the attention row from the position of y_t


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with eager attention and experts (grouped products have no float64) and transformers' own forwards."""
    eager = {"attn_implementation": "eager"}
    if AutoConfig.from_pretrained(folder).model_type.endswith("_moe"):
        eager["experts_implementation"] = "eager"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **eager).eval()
    require_own_forwards(model)
    if dtype is torch.float64:
        for module in model.modules():
            if hasattr(module, "chunk_gated_delta_rule"):
                module.chunk_gated_delta_rule = gated_delta_rule
    return model


def gated_delta_rule(
    q_BSHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHE: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, None]:
    """Linear attention token by token, without an initial state (arXiv 2412.06464, equation 10); transformers computes
    it in chunks and in float32.

    Args:
        q_BSHD, k_BSHD: queries and keys, not normalised.
        v_BSHE: values.
        g, beta: [B, S, H] logarithm of the decay, and the step size.

    Returns:
        ``(outputs [B, S, H, E], None)``, of the type of the values.
    """
    unit = [x.double() * (x.double().square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q_BSHD, k_BSHD)]
    q, k, v = unit[0] * q_BSHD.shape[-1] ** -0.5, unit[1], v_BSHE.double()
    state_BHDE, out = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]), []
    for t in range(v.shape[1]):
        state_BHDE = state_BHDE * g[:, t].double().exp()[..., None, None]
        known = torch.einsum("bhde,bhd->bhe", state_BHDE, k[:, t])
        step = (v[:, t] - known) * beta[:, t].double()[..., None]
        state_BHDE = state_BHDE + torch.einsum("bhd,bhe->bhde", k[:, t], step)
        out.append(torch.einsum("bhde,bhd->bhe", state_BHDE, q[:, t]))
    return torch.stack(out, 1).to(v_BSHE.dtype), None


def inputs_of(model: PreTrainedModel, row: dict[str, Any]) -> dict[str, Any]:
    """A row as a batch of one, with the positions it carries: [S], or [4, S] of which row 0 is the text's."""
    images = {k: v for k, v in row["multi_modal_inputs"].items() if k in ("pixel_values", "image_grid_thw")}
    if images:
        images["pixel_values"] = images["pixel_values"].to(model.dtype)
    ids = row["input_ids"][None]
    return {
        "input_ids": ids,
        "position_ids": row["position_ids"].unsqueeze(-2),
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
        **images,
    }


@torch.no_grad()
def reference_log_probs(folder: Path, rows: Sequence[dict[str, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[(log-prob of the next token [S - 1], entropy [S - 1])] in float32, one row at a time."""
    model = load(folder, torch.float32)
    out = []
    for row in rows:
        logp_SV = model(**inputs_of(model, row)).logits[0, :-1].log_softmax(-1)
        out.append((logp_SV.gather(-1, row["input_ids"][1:, None])[:, 0], -(logp_SV.exp() * logp_SV).sum(-1)))
    return out


@dataclass(frozen=True)
class RowTruth:
    """One row, all layers.

    Attributes:
        attention: float64 [L, H, S, S]; NaN in layers of linear attention.
        lse: float64 [L, H, S] log-sum-exp of the causal logits; NaN in layers of linear attention.
        hidden: float64 [S, D], last hidden states.
        prompt: tokens of the prompt.
        keys: positions (int64) of ``image``, ``region``, ``sink``, ``system``, ``question`` and ``response``.
        boxes: positions inside each single box, in the order of the row.
    """

    attention: torch.Tensor
    lse: torch.Tensor
    hidden: torch.Tensor
    prompt: int
    keys: dict[str, torch.Tensor]
    boxes: list[torch.Tensor]

    def rows_of(self, query_row: str) -> slice:
        """Attention rows that describe y_0 .. y_(T-1)."""
        first = self.prompt + ROW_OFFSET[query_row]
        return slice(first, first + self.attention.shape[-1] - self.prompt)

    def mass(self, columns: torch.Tensor, layers: Sequence[int], query_row: str = "input") -> torch.Tensor:
        """float64 [T, H]: attention on some positions, mean over layers."""
        chosen_LHTS = self.attention[list(layers)][:, :, self.rows_of(query_row)]
        return chosen_LHTS[..., columns].sum(-1).mean(0).T

    def profile(self, layers: Sequence[int], query_row: str = "input") -> torch.Tensor:
        """float64 [T, V]: attention on each visual token, mean over layers and heads."""
        return self.attention[list(layers)][:, :, self.rows_of(query_row)][..., self.keys["image"]].mean((0, 1))


@torch.no_grad()
def eager_truth(folder: Path, rows: Sequence[dict[str, Any]], coverage: float = 0.5) -> list[RowTruth]:
    """Run every row through the model in float64.

    Weights and products are float64. transformers takes norms, rotary angles and the softmax in float32 whatever the
    model's type is, so an error below about 1e-7 is the oracle's.
    """
    model = load(folder, torch.float64)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    truths = []
    for row in rows:
        with _log_sum_exp(model) as lse:
            out = model.model(**inputs_of(model, row), output_attentions=True)
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"] * len(lse)
        full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        assert len(kinds) == model.config.get_text_config().num_hidden_layers
        assert sorted(lse) == full
        matrices = dict(zip(full, (weights[0] for weights in out.attentions), strict=True))
        nothing = torch.full_like(matrices[full[-1]], float("nan"))
        attention_LHSS = torch.stack([matrices.get(layer, nothing) for layer in range(len(kinds))])
        assert attention_LHSS.dtype == out.last_hidden_state.dtype == torch.float64
        image_V = (row["input_ids"][: row["prompts"].shape[0]] == model.config.image_token_id).nonzero().flatten()
        boxes = _boxes(model, row, image_V, coverage)
        keys = {
            "image": image_V,
            "region": torch.cat([image_V[:0], *boxes]).unique(),
            "sink": torch.tensor([0]),
            "system": _occurrences(row, tokenizer, SYSTEM),
            "question": _occurrences(row, tokenizer, QUESTION, IMAGE_LINE),
            "response": torch.arange(row["prompts"].shape[0], row["input_ids"].shape[0]),
        }
        truths.append(
            RowTruth(
                attention_LHSS,
                torch.stack([lse.get(n, nothing[..., 0]) for n in range(len(kinds))]),
                out.last_hidden_state[0],
                row["prompts"].shape[0],
                keys,
                boxes,
            )
        )
    return truths


def eager_masses(
    folder: Path, rows: Sequence[dict[str, Any]], layers: Sequence[int], query_row: str = "input"
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[(image mass [T], region mass [T])] of each row, mean over heads and layers, float64."""
    return [
        tuple(truth.mass(truth.keys[name], layers, query_row).mean(-1) for name in ("image", "region"))  # type: ignore
        for truth in eager_truth(folder, rows)
    ]


def _boxes(model: PreTrainedModel, row: dict[str, Any], image_V: torch.Tensor, coverage: float) -> list[torch.Tensor]:
    """Positions of the visual tokens of each box; a row without an image has no box, whatever it carries."""
    out: list[torch.Tensor] = []
    if image_V.numel() == 0:
        return out
    grids, start = _token_grids(model.config, row["multi_modal_inputs"]), 0
    for levels, boxes in zip(grids, row["extra_info"]["boxes"], strict=True):
        out += [
            image_V[[start + token for level in levels for token in _cells_in(box, level, coverage)]] for box in boxes
        ]
        start += sum(level.numel() for level in levels)
    assert start == image_V.numel(), "the visual tokens are not those of the grids"
    return out


def _token_grids(config: Any, image: dict[str, Any]) -> list[list[torch.Tensor]]:
    """For each image its pictures, each a grid (int64 [rows, columns]) of the numbers of its visual tokens."""
    if "image_grid_thw" in image:
        merge = config.vision_config.spatial_merge_size
        sizes = [(h // merge, w // merge) for _, h, w in image["image_grid_thw"].tolist()]
        return [[torch.arange(rows * columns).view(rows, columns)] for rows, columns in sizes]
    # tiles in rows; each hands out its tokens before the next does; then, unless there is one tile, the whole image
    side, out = round(config.image_seq_length**0.5), []
    for columns, rows in image["image_tile_grid"].tolist():
        tokens = torch.arange(rows * columns * side**2).view(rows, columns, side, side)
        levels = [tokens.transpose(1, 2).reshape(rows * side, columns * side)]
        if rows * columns > 1:
            levels.append(tokens.numel() + torch.arange(side**2).view(side, side))
        out.append(levels)
    return out


def _cells_in(box: Sequence[float], grid_RC: torch.Tensor, coverage: float) -> list[int]:
    """Tokens of which a box covers a share of at least ``coverage``; if there is none, the most covered."""
    x0, y0, x1, y1 = box
    rows, columns = grid_RC.shape

    def share(low: float, high: float, cell: int, cells: int) -> float:
        return max(0.0, min(high * cells, cell + 1) - max(low * cells, cell))

    covered = [share(y0, y1, i, rows) * share(x0, x1, j, columns) for i in range(rows) for j in range(columns)]
    threshold = min(coverage, max(covered))
    tokens = grid_RC.flatten().tolist()
    return [token for token, value in zip(tokens, covered, strict=True) if value >= threshold - 1e-9]


def _occurrences(row: dict[str, Any], tokenizer: Any, text: str, line_of: str = "") -> torch.Tensor:
    """Positions of the prompt's tokens that spell a text, wherever it stands, and of the newline after ``line_of``."""
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt, n = row["prompts"].tolist(), len(wanted)
    found = [i + k for i in range(len(prompt) - n + 1) if prompt[i : i + n] == wanted for k in range(n)]
    if line_of in tokenizer.get_vocab():
        line = tokenizer.convert_tokens_to_ids(line_of)
        found += [i + 1 for i, token in enumerate(prompt) if token == line]
        assert all(tokenizer.decode(prompt[i + 1]) == "\n" for i, token in enumerate(prompt) if token == line)
    return torch.tensor(sorted(found), dtype=torch.int64)


@contextmanager
def _log_sum_exp(model: PreTrainedModel) -> Iterator[dict[int, torch.Tensor]]:
    """Collect lse [H, S] of each decoder layer from what eager attention is called with."""
    decoder = model.model.language_model
    module = importlib.import_module(type(decoder.layers[-1].self_attn).__module__)
    original, found = module.eager_attention_forward, {}

    def listening(attention: Any, query: Any, key: Any, *args: Any, scaling: float, **kwargs: Any) -> Any:
        if getattr(attention, "layer_idx", None) is not None:  # vision attention has none
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            late = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).triu(1)
            logits = (query @ keys.transpose(2, 3) * scaling).masked_fill(late, float("-inf"))
            found[attention.layer_idx] = logits.logsumexp(-1)[0]
        return original(attention, query, key, *args, scaling=scaling, **kwargs)

    module.eager_attention_forward = listening
    try:
        yield found
    finally:
        module.eager_attention_forward = original


# ---- comparison with what the engine hands out


def difference(statistic: Any, values: torch.Tensor, row: dict[str, Any], truth: RowTruth) -> torch.Tensor:
    """How far a measured statistic of one row lies from the truth.

    Args:
        statistic: a ``sayo_verl.probe.statistics.Statistic``.
        values: this row's values: [T] or [T, W], or [V] for ``patch_sums``.
        row: as ``engine_rows.make_rows`` gives it.
        truth: the row's.

    Returns:
        Absolute differences, flat; of the log-sum-exp, which no range bounds, relative to its size where that is above
        1. Indices are judged by what lies at them, so that ties do not count.
    """
    assert values.dtype == torch.float32
    assert not values.requires_grad
    if statistic.name == "patch_sums":
        wanted = truth.profile(statistic.layers, statistic.query_row).sum(0)
        if wanted.numel() == 0:
            assert values.shape == (1,)
            assert torch.isnan(values).all(), "a row without an image has no patches"
            return torch.zeros(1)
        assert values.shape == wanted.shape
        return (values.double() - wanted).abs()
    assert values.shape[0] == row["input_ids"].shape[0] - truth.prompt, "one value per response token and no others"
    got = values.double()
    if statistic.name.endswith("_index"):
        table = _ranked(statistic, truth)
        return (_at(table, got) - _best(table, statistic.size)).abs().flatten()
    wanted = _expected(statistic, truth)
    assert got.shape == wanted.shape, f"{statistic.key}: {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    scale = wanted.abs().clamp(min=1.0) if statistic.name == "lse" else 1.0
    return ((got - wanted).abs() / scale).flatten()


def signed_difference(statistic: Any, values: torch.Tensor, truth: RowTruth) -> torch.Tensor:
    """Measured minus true value of a statistic that is an attention mass, flat; a mean far from 0 is a bias."""
    return (values.double() - _expected(statistic, truth)).flatten()


def _expected(statistic: Any, truth: RowTruth) -> torch.Tensor:
    """float64 [T], [T, H] or [T, k]."""
    layers, rows = list(statistic.layers), truth.rows_of(statistic.query_row)
    if statistic.name == "image_cosine":
        image_D = truth.hidden[truth.keys["image"]].mean(0) if truth.keys["image"].numel() else truth.hidden[0] * 0
        return torch.cosine_similarity(truth.hidden[rows], image_D[None], dim=-1)
    if statistic.name == "box_mass":
        boxes = [*truth.boxes, *[truth.keys["image"][:0]] * statistic.size][: statistic.size]
        return torch.stack([truth.mass(box, layers, statistic.query_row).mean(-1) for box in boxes], -1)
    if statistic.name in ("top_patch_mass", "neighbour_similarity"):
        return _best(_ranked(statistic, truth), statistic.size)
    if statistic.name == "lse":
        value_TH = truth.lse[layers][:, :, rows].mean(0).T
    else:
        columns = truth.keys[statistic.name.removesuffix("_mass")]
        value_TH = truth.mass(columns, layers, statistic.query_row)
    return value_TH if statistic.per_head else value_TH.mean(-1)


def _ranked(statistic: Any, truth: RowTruth) -> torch.Tensor:
    """float64 [T, n] of what is ranked; -inf where something must not be named."""
    profile_TV = truth.profile(statistic.layers, statistic.query_row)
    if statistic.name.startswith("top_patch"):
        return profile_TV
    unit_TV = torch.nn.functional.normalize(profile_TV, dim=-1)
    # a token is no neighbour of itself; without an image all profiles are empty and their cosine counts as 0
    return (unit_TV @ unit_TV.T).fill_diagonal_(float("-inf"))


def _best(table_Tn: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row; 0 where there are fewer."""
    best = table_Tn.topk(min(k, table_Tn.shape[1])).values
    return torch.nn.functional.pad(best.masked_fill(best.isinf(), 0.0), (0, k - best.shape[1]))


def _at(table_Tn: torch.Tensor, index_Tk: torch.Tensor) -> torch.Tensor:
    """What lies at the named columns; 0 at -1."""
    assert (index_Tk >= -1).all()
    assert (index_Tk < table_Tn.shape[1]).all()
    for named, there in zip(index_Tk.tolist(), table_Tn.isfinite().sum(1).tolist(), strict=True):
        real = [i for i in named if i >= 0]
        assert len(set(real)) == len(real) == min(len(named), there), f"repeated or missing: {named}"
    nothing = torch.zeros(len(table_Tn), 1, dtype=torch.float64)
    return torch.cat([table_Tn, nothing], 1).gather(1, index_Tk.long().where(index_Tk >= 0, table_Tn.shape[1]))
