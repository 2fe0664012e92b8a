"""How many rows each part of a mixture gives: exact numbers from shares.

Error code: D57 what is asked for cannot be had.
"""

from collections.abc import Mapping
from fractions import Fraction

from sayo_verl.errors import SayoError

ALL, REST = "all", "rest"

Share = float | str


def check_shares(shares: Mapping[str, Share]) -> None:
    """Raises:
    SayoError: D57 for a share that is none, and for shares that do not add up to 1.
    """
    for part, share in shares.items():
        if share not in (ALL, REST) and not (isinstance(share, int | float) and 0 < share <= 1):
            raise SayoError(
                "D57",
                "a share is out of range",
                where=f"--mix {part}",
                got=repr(share),
                wanted=f"more than 0, at most 1, or {ALL!r} or {REST!r}",
                fix="correct it",
            )
    numbers = _numbers(shares)
    if not shares or (numbers and abs(sum(numbers.values(), Fraction(0)) - 1) > Fraction(1, 10**6)):
        raise SayoError(
            "D57",
            "the shares do not add up to 1",
            where="--mix",
            got=dict(shares),
            wanted="numbers that add up to 1, beside parts that give all; or one part that gives the rest",
            fix="correct them",
        )


def _numbers(shares: Mapping[str, Share]) -> dict[str, Fraction]:
    """Shares of what the parts that give all leave."""
    return {part: Fraction(1 if share == REST else str(share)) for part, share in shares.items() if share != ALL}


def train_counts(shares: Mapping[str, Share], rows: int, there: Mapping[str, int]) -> dict[str, int]:
    """How many train rows each part gives.

    Args:
        shares: part -> number, "all" or "rest".
        rows: of all together.
        there: part -> rows it has.

    Raises:
        SayoError: D57 where a part has too few, or those that give all have too many.
    """
    counts = {part: there[part] for part, share in shares.items() if share == ALL}
    rest = rows - sum(counts.values())
    numbers = _numbers(shares)
    numbers = {part: share / sum(numbers.values()) for part, share in numbers.items()}
    if rest < 0 or (rest and not numbers):
        raise SayoError(
            "D57",
            "parts that give all their rows have another number of them",
            where="--rows",
            got=f"{rows} wanted, {sum(counts.values())} there: {counts}",
            wanted="equal numbers" if not numbers else "at least as many rows",
            fix="correct --rows",
        )
    counts |= largest_remainder(numbers, rest)
    scarce = {part: n for part, n in counts.items() if n > there[part]}
    if scarce:
        most = rows - rest + min(int(there[part] / share) for part, share in numbers.items())
        raise SayoError(
            "D57",
            "a part has too few rows",
            where="--mix",
            got="; ".join(f"{part} has {there[part]} rows, {n} wanted" for part, n in scarce.items()),
            wanted="rows without repetition",
            fix=f"set --rows to {most} or less, lower the part's share, or prepare more of it",
        )
    return {part: counts[part] for part in shares}


def val_counts(train: Mapping[str, int], rows: int, there: Mapping[str, int]) -> dict[str, int]:
    """How many validation rows each part gives, by the shares of the train rows among the parts that have any.

    Args:
        train: part -> train rows.
        rows: of all together; -1: as many as the shares allow.
        there: part -> validation rows it has.

    Raises:
        SayoError: D57 where the shares do not allow so many.
    """
    having = {part: n for part, n in train.items() if n and there[part]}
    total = sum(having.values())
    shares = {part: Fraction(n, total) for part, n in having.items()}
    most = min((int(there[part] / share) for part, share in shares.items()), default=0)
    if rows > most:
        raise SayoError(
            "D57",
            "the parts held out too few rows",
            where="--val-rows",
            got=f"{rows} wanted, there are {dict(there)}",
            wanted=f"at most {most}, by the shares of the train rows",
            fix="lower --val-rows, or prepare the parts with a higher --val-share",
        )
    return {**dict.fromkeys(train, 0), **largest_remainder(shares, most if rows < 0 else rows)}


def largest_remainder(shares: Mapping[str, Fraction], rows: int) -> dict[str, int]:
    """Whole numbers that add up to ``rows`` and are as the shares (which add up to 1); ties go to who comes first."""
    counts = {part: int(share * rows) for part, share in shares.items()}
    by_remainder = sorted(shares, key=lambda part: counts[part] - shares[part] * rows)
    for part in by_remainder[: rows - sum(counts.values())] if shares else ():
        counts[part] += 1
    return counts
