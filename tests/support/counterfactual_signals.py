"""Signals of responses to one changed image, from differences of log-probs.

Shape suffixes: B rows, T response tokens.
"""

from collections.abc import Mapping, Sequence

import torch

from sayo_verl.methods import Signals
from sayo_verl.vision.intervention import Intervention

NAN = float("nan")


def changed(
    differences: Sequence[Sequence[float]],
    uid: str,
    *,
    no_image: Sequence[int] = (),
    correct: Sequence[float] | None = None,
    reports: Mapping[str, tuple] | None = None,
) -> Signals:
    """Rows whose tokens lose ``differences`` nats with the changed image; NaN outside the response.

    Args:
        differences: log pi(y_t | image) - log pi(y_t | changed image) of each response.
        uid: a letter per row.
        no_image: rows without an image.
        correct: ``acc``.
        reports: of the reward function.
    """
    B, T = len(differences), max(map(len, differences))
    rows = torch.tensor([[*row, *[NAN] * (T - len(row))] for row in differences]).reshape(B, T)
    return Signals(
        response_mask=(~rows.isnan()).long(),
        entropy=torch.zeros(B, T),
        log_probs=torch.full((B, T), -1.0),
        statistics={},
        image_tokens=torch.tensor([0.0 if row in no_image else 4.0 for row in range(B)]),
        region_tokens=torch.zeros(B),
        is_padding=torch.zeros(B, dtype=torch.bool),
        uid=tuple(uid),
        counterfactuals={Intervention(): -1.0 - rows},
        correct=None if correct is None else torch.tensor(correct),
        reports=reports or {},
    )
