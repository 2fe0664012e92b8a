"""Responses and their rewards."""

from hypothesis import settings

from sayo_verl.reward import (
    compute_score,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=150)


GOOD = "<think> circle red . </think> <answer> red </answer>"


def marks(response: str, truth: str = "red") -> tuple[float, float]:
    """(format, acc) of a response."""
    score = compute_score("sayo/scenes", response, truth)
    return score["format"], score["acc"]
