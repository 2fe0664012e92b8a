"""Measured models and lengths, and their operation counts by arithmetic. Does not need torch.

An operation is a multiplication or an addition. H query heads, D head dimension.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a text model, as in config.json; ``family`` is its ``model_type`` without ``_text``."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int


@dataclass(frozen=True)
class Lengths:
    """Tokens of one sequence: text before and after the image, the image as (rows, cols), the response."""

    before: int
    image: tuple[int, int]
    after: int
    response: int

    @property
    def image_tokens(self) -> int:
        return self.image[0] * self.image[1]

    @property
    def prompt(self) -> int:
        return self.before + self.image_tokens + self.after

    @property
    def total(self) -> int:
        return self.prompt + self.response

    @property
    def pairs(self) -> int:
        """Response rows x causal keys: query-key products for one head's statistics."""
        return self.response * self.prompt + self.response * (self.response + 1) // 2


# An eighth of Qwen3-VL-8B's width, its full depth, its ratios of query heads to key heads and of FFN to width, and a
# vocabulary that keeps lm_head's share of the pass. The probe's share depends on the ratio of tokens to width, so 400
# tokens here correspond to 3,200 of the real model.
SMALL = Shape("Qwen3-VL-8B at 1/8 width", "qwen3_vl", 36, 512, 8, 2, 64, 1536, 18992)
REAL = (
    Shape("Qwen3-VL-8B", "qwen3_vl", 36, 4096, 32, 8, 128, 12288, 151936),
    Shape("Qwen2.5-VL-7B", "qwen2_5_vl", 28, 3584, 28, 4, 128, 18944, 152064),
)
# (name, H, G, D) of every family's text attention, and head dimensions that no family uses yet
HEADS = (
    ("Qwen3-VL-2B", 16, 8, 128),
    ("Qwen3-VL-4B and 8B, InternVL3.5-4B and 8B", 32, 8, 128),
    ("Qwen3-VL-32B", 64, 8, 128),
    ("Qwen3-VL-30B-A3B, InternVL3.5-30B-A3B", 32, 4, 128),
    ("Qwen3-VL-235B-A22B", 64, 4, 128),
    ("Qwen2.5-VL-3B", 16, 2, 128),
    ("Qwen2.5-VL-7B", 28, 4, 128),
    ("Qwen2.5-VL-32B, InternVL3.5-14B", 40, 8, 128),
    ("D 64", 8, 2, 64),
    ("D 80", 8, 4, 80),
    ("D 96", 12, 4, 96),
    ("D 256", 8, 2, 256),
)
# for the self-check
TINY = (
    Shape("tiny Qwen3-VL", "qwen3_vl", 5, 64, 4, 1, 16, 96, 96),
    Shape("tiny Qwen2.5-VL", "qwen2_5_vl", 5, 64, 4, 2, 16, 96, 96),
)
REAL_LENGTHS = tuple(Lengths(64, image, 64, response) for image in ((32, 32), (64, 64)) for response in (512, 2048))


def pass_operations(shape: Shape, lengths: Lengths) -> int:
    """The text model's log-prob pass over one sequence: linear layers, causal attention, ``lm_head`` on every token."""
    attention = shape.heads * shape.head_dim
    weights = shape.hidden * (2 * attention + 2 * shape.kv_heads * shape.head_dim + 3 * shape.ffn)
    T = lengths.total
    return shape.layers * (2 * T * weights + 4 * attention * T * (T + 1) // 2) + 2 * T * shape.hidden * shape.vocabulary


def qwen3_vision_operations(out: int, image_tokens: int) -> int:
    """Qwen3-VL's vision tower (27 blocks of 1152, 4304 in the MLP, 4 patches a token, 4 mergers) on one image."""
    depth, width, ffn, patches = 27, 1152, 4304, 4 * image_tokens
    blocks = depth * (2 * patches * (4 * width**2 + 2 * width * ffn) + 4 * width * patches**2)
    mergers = 4 * 2 * image_tokens * (4 * width) * (4 * width + out)
    return blocks + mergers + 2 * patches * width * 3 * 2 * 16 * 16


def masses_operations(shape: Shape, lengths: Lengths) -> int:
    """One layer of the one-pass scheme, which computes the log-sum-exp over all causal keys: 2 H D x pairs."""
    return 2 * shape.heads * shape.head_dim * lengths.pairs


def profile_operations(shape: Shape, lengths: Lengths) -> int:
    """One layer's attention on single visual tokens."""
    return 2 * shape.heads * shape.head_dim * lengths.response * lengths.image_tokens


def masses_bytes(shape: Shape, lengths: Lengths, element: int, n_sets: int) -> int:
    """Bytes moved at least once: queries of the response, all keys, the sums and the log-sum-exp in float32."""
    queries, keys = lengths.response * shape.heads, lengths.total * shape.kv_heads
    return (queries + keys) * shape.head_dim * element + 4 * (n_sets + 1) * queries


def profile_bytes(shape: Shape, lengths: Lengths, element: int) -> int:
    """Bytes of the response's queries, the image's keys, the log-sum-exp and the profile in float32."""
    queries, keys = lengths.response * shape.heads, lengths.image_tokens * shape.kv_heads
    return (queries + keys) * shape.head_dim * element + 4 * (queries + lengths.response * lengths.image_tokens)
