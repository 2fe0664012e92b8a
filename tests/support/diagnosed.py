"""Invented responses as ``sayo diagnose`` stores them."""

from collections.abc import Callable

import numpy as np

from sayo_verl.diagnose.answers import IMAGE, REGION, Answer, needs_of, usable_methods
from sayo_verl.probe.statistics import log_probs_key

IMAGE_TOKENS, REGION_TOKENS = 16, 2
Draw = Callable[[np.random.Generator, int, int], float]  # random numbers, row, sample


def answers(
    rows: int = 30,
    samples: int = 4,
    *,
    seed: int = 0,
    boxes: bool = True,
    truth: bool = True,
    tokens: int | None = None,
    accuracy: Draw = lambda random, row, sample: float(random.random() < 0.5),
    looks: Callable[[int, float], float] = lambda row, accuracy: 1.0,
    lift_of_layers: Callable[[int], list[float]] = lambda row: [1.0, 1.0, 1.0],
) -> list[Answer]:
    """Responses with heavy-tailed attention.

    Args:
        tokens: of each response; None: 6 to 14.
        accuracy: of a response.
        looks: factor on the attention to the boxes, of a row and the response's accuracy.
        lift_of_layers: attention on the boxes over chance of each layer, for a row.
    """
    random = np.random.default_rng(seed)
    methods, _ = usable_methods()
    needs = needs_of(methods.values())
    statistics = needs.statistics.statistics
    found = []
    for row in range(rows):
        for sample in range(samples):
            T = tokens or int(random.integers(6, 15))
            right = accuracy(random, row, sample)
            values = {s.key: random.uniform(0.1, 0.3, T) for s in statistics if not s.size}
            target, rest = random.lognormal(-4, [[1.2], [0.5]], (2, T)) * [[looks(row, right)], [1.0]]
            region, other = target * REGION_TOKENS, rest * (IMAGE_TOKENS - REGION_TOKENS)
            scale = np.maximum(region + other, 0.8) / 0.8
            values[IMAGE.key], values[REGION.key] = (region + other) / scale, region / scale * boxes
            near = (np.arange(T)[:, None] + np.arange(1, 9)) % T
            values |= {s.key: near[:, : s.size] for s in statistics if s.name == "neighbour_index"}
            values |= {s.key: np.full((T, s.size), 0.5) for s in statistics if s.name == "neighbour_similarity"}
            values |= {"entropy": random.uniform(0, 2, T), "log_probs": -random.uniform(0, 2, T)}
            values |= {log_probs_key(i): values["log_probs"] - random.uniform(0, 1, T) for i in needs.interventions}
            if sample == 0:
                image = np.full((3, 2), 0.2)
                lift = np.array(lift_of_layers(row))[:, None] * random.uniform(0.9, 1.1, (3, 2))
                heads = {"image_mass": image, "spatial_entropy": np.arange(6.0).reshape(3, 2), "layers": np.arange(3)}
                if boxes:
                    heads |= {"region_mass": image * lift * REGION_TOKENS / IMAGE_TOKENS, "box_hit": lift / 8}
                values |= {f"heads/{name}": value for name, value in heads.items()}
                seen = {"sink_mass": 0.5, "image_mass": 0.3, "border_mass": 0.2}
                values |= {f"seen/{name}": np.full(T, value) for name, value in seen.items()}
                values |= {"seen/steady_share": np.array(0.1), "seen/border_chance": np.array(0.5)}
            found.append(
                Answer(
                    row=row,
                    sample=sample,
                    where=f"row {row}",
                    question="What <b>colour</b>?",
                    truth="red",
                    text="red",
                    ids=[5] * T,
                    accuracy=right if truth else float("nan"),
                    image_tokens=IMAGE_TOKENS,
                    region_tokens=REGION_TOKENS * boxes,
                    finished=True,
                    values={key: np.asarray(value, np.float32) for key, value in values.items()},
                )
            )
    return found
