"""Forecast of the kernel's time on an H100 from products, exponentials and bytes against the pass's operations.

Nothing here was measured. The rates of exponentials and bytes are from the data sheet. The rate of products is that of
large bfloat16 products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cost.cells import duration, span, table
from cost.shapes import (
    REAL,
    REAL_LENGTHS,
    Lengths,
    Shape,
    masses_bytes,
    masses_operations,
    pass_operations,
    profile_operations,
    qwen3_vision_operations,
)

PRODUCTS = 800e12  # multiplications and additions a second
EXPONENTIALS = 132 * 16 * 1.7e9  # multiprocessors x special-function results a cycle x cycles a second
BYTES = 3.35e12  # a second
# Operations a second of a kernel whose exponentials wait for its products, somewhat below the bound of the units
IN_TURN = (350e12, 400e12)
N_SETS = 2  # image and region, requested by attn_region
SHAPE = REAL[0]  # the model of the target, and of the vision tower


@dataclass(frozen=True)
class Work:
    """One layer's work on one sequence.

    Attributes:
        operations: multiplications and additions.
        exponentials: one for each row, key and query head.
        moved: bytes that must cross memory once.
    """

    operations: int
    exponentials: int
    moved: int

    @property
    def floors(self) -> tuple[float, float, float]:
        """Seconds of each unit: products, exponentials, bytes."""
        return self.operations / PRODUCTS, self.exponentials / EXPONENTIALS, self.moved / BYTES

    @property
    def overlapped(self) -> float:
        """Seconds if the units work at the same time."""
        return max(self.floors)

    @property
    def in_turn(self) -> float:
        """Seconds if exponentials wait for products; copies overlap both."""
        products, exponentials, moved = self.floors
        return max(products + exponentials, moved)


def work(shape: Shape, n: Lengths, lse_given: bool) -> Work:
    """One layer's work. With a given log-sum-exp only the image's keys are visited, otherwise all causal keys."""
    pairs = n.response * n.image_tokens if lse_given else n.pairs
    operations = profile_operations(shape, n) if lse_given else masses_operations(shape, n)
    skipped_keys = n.total - n.image_tokens if lse_given else 0
    moved = masses_bytes(shape, n, 2, N_SETS) - 2 * skipped_keys * shape.kv_heads * shape.head_dim
    return Work(operations, shape.heads * pairs, moved)


def pass_seconds(n: Lengths, *, vision: bool) -> float:
    """A log-prob pass at the full rate of products, with or without the vision tower."""
    tower = qwen3_vision_operations(SHAPE.hidden, n.image_tokens) if vision else 0
    return (pass_operations(SHAPE, n) + tower) / PRODUCTS


def in_turn_limit() -> float:
    """Operations a second if exponentials wait for products and both run at their full rates."""
    longest = work(SHAPE, REAL_LENGTHS[-1], lse_given=False)
    return longest.operations / longest.in_turn


def forecast(n: Lengths, layers: int, *, lse_given: bool, vision: bool) -> tuple[float, float]:
    """Lowest and highest per cent of the pass for a kernel whose exponentials wait for its products."""
    operations = layers * work(SHAPE, n, lse_given).operations
    fast, slow = (100 * operations / rate / pass_seconds(n, vision=vision) for rate in IN_TURN[::-1])
    return fast, slow


def forecast_cell(sizes: Sequence[Lengths], layers: int, digits: int, *, lse_given: bool, vision: bool) -> str:
    """``0.02 to 0.08 %`` over some sizes."""
    every = [x for n in sizes for x in forecast(n, layers, lse_given=lse_given, vision=vision)]
    return span(every, "%", digits)


TEXT = """\
One sequence at the shape of {name}, with 128 tokens of text in the prompt. For each response row, causal key
and query head the probe takes 2 x {dims} operations and one exponential. Attention takes twice the operations for the
same exponential, so exponentials weigh twice as much here. The rates of an H100 are {products:.0f} T operations,
{exponentials:.1f} T exponentials (132 multiprocessors x 16 a cycle x 1.7 GHz) and {bytes:.2f} TB a second.
Launches and work on the host are not included.
"""
FLOORS = """\
Bounds for one layer, from the card's rates. "Overlapped" is the largest of the times. In "in turn" the exponentials
wait for the products. A kernel that computes the log-sum-exp itself visits all causal keys. With the log-sum-exp of the
model's own attention it visits only the image.
"""
SHARES = """\
The same bounds as a share of the pass, from overlapped to in turn. The pass is computed at the full rate of products. A
real pass does not reach this rate, so its shares are smaller. This page times the pass without the vision tower.
"""


def arithmetic() -> list[str]:
    """The section of the page, with all figures computed here."""
    rates = {"products": PRODUCTS / 1e12, "exponentials": EXPONENTIALS / 1e12, "bytes": BYTES / 1e12}
    cases = [(n, given, work(SHAPE, n, given)) for given in (False, True) for n in REAL_LENGTHS]
    passes = [
        [
            size(n),
            f"{pass_operations(SHAPE, n) / 1e12:.1f} T",
            f"{qwen3_vision_operations(SHAPE.hidden, n.image_tokens) / 1e12:.1f} T",
            duration(pass_seconds(n, vision=False)),
            duration(pass_seconds(n, vision=True)),
        ]
        for n in REAL_LENGTHS
    ]
    floors = [
        [
            size(n),
            _keys(given),
            f"{w.operations / 1e9:.1f} G",
            f"{w.exponentials / 1e6:.0f} M",
            f"{w.moved / 1e6:.1f} MB",
            *map(duration, (*w.floors, w.overlapped, w.in_turn)),
        ]
        for n, given, w in cases
    ]
    shares = [
        [
            size(n),
            _keys(given),
            *(
                span(
                    [100 * layers * t / pass_seconds(n, vision=vision) for t in (w.overlapped, w.in_turn)], "%", digits
                )
                for layers, digits in ((1, 3), (SHAPE.layers, 2))
                for vision in (True, False)
            ),
        ]
        for n, given, w in cases
    ]
    both = "with vision tower", "text model only"
    columns = [f"{layers}, {what}" for layers in ("1 layer", f"{SHAPE.layers} layers") for what in both]
    by_unit = ["by products", "by exponentials", "by bytes", "overlapped", "in turn"]
    return [
        "## Arithmetic, not measurement",
        "",
        TEXT.format(name=SHAPE.name, dims=SHAPE.head_dim, **rates),
        *table(["image + response tokens", "text model", "vision tower", "pass without tower", "pass with it"], passes),
        FLOORS,
        *table(["image + response tokens", "keys", "operations", "exponentials", "bytes", *by_unit], floors),
        SHARES,
        *table(["image + response tokens", "keys", *columns], shares),
    ]


def size(n: Lengths) -> str:
    """``4,096 + 2,048``."""
    return f"{n.image_tokens:,} + {n.response:,}"


def _keys(lse_given: bool) -> str:
    return "image, given log-sum-exp" if lse_given else "all causal keys"
