"""Which values of a reward function are numbers; the launcher and the trainer read them alike."""

import math
from typing import Any


def number(value: Any) -> float | None:
    """The value as a float; None for text, None, other objects, infinity and NaN.

    >>> number(True), number("1"), number(None)
    (1.0, None, None)
    """
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
