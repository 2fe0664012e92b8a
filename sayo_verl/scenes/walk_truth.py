"""The truth of every word of a walk: its kind, whether it must look, where, whether it is right, the first error.

A response to a walk of K steps has 4 K + 2 words, which stand between spaces. They are read by position:

    then b2 right ,   next c2 up ,   ...   answer d1

    word         kind           right if
    then         filler         it is one of ``FILLERS``: a free choice
    b2           cell           it is the start; later the cell that the text so far leads to (arithmetic on the text)
    right        direction      it is the arrow in the cell that the text just named (perceptual), or the word of the
                                question where the question has the moves (not perceptual)
    ,            comma          always there
    answer       answer
    d1           answer cell    it is the cell that the text so far leads to
    more words   end            never: the response should have ended

"Right" is judged given the text so far. After an error the walk goes on from there, so a later word may be right again.
A word that cannot be read in its place is wrong. The walk goes on as if the right word stood there.

The reward is 1 if every word can be read in its place, there are 4 K + 2 of them, and the answer's cell is the end of
the true walk. It does not judge the cells and directions on the way, so there are lucky answers. Nothing here imports
more than the standard library.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

DIRECTIONS = ("up", "right", "down", "left")
FILLERS = ("so", "then", "now", "next", "well", "ok")
COMMA, ANSWER = ",", "answer"
MAX_GRID = 8
_OFFSETS = ((-1, 0), (0, 1), (1, 0), (0, -1))  # row, column
_STEP = ("filler", "cell", "direction", "comma")
_DIRECTION_OF = {word: i for i, word in enumerate(DIRECTIONS)}


@dataclass(frozen=True)
class Truth:
    """What is true of the T words of a response; the end token is no word.

    Attributes:
        kinds: [T] of the module's table.
        perceptual: [T] whether the right word depends on the image, given the text so far.
        region: [T] index of the cell whose arrow the word depends on; -1 for a word that is not perceptual.
        right: [T] whether the word is right, given the text so far.
        first_error: index of the first wrong word, or T. A response that ends too early without a wrong word has T:
            there the end token is the error.
        readable: the whole format is there.
        rewarded: the reward is 1.
    """

    kinds: tuple[str, ...]
    perceptual: tuple[bool, ...]
    region: tuple[int, ...]
    right: tuple[bool, ...]
    first_error: int
    readable: bool
    rewarded: bool

    @property
    def marks(self) -> str:
        """One letter for each word: "." right, "x" wrong; of perceptual words "P" right, "E" wrong."""
        return "".join("xE.P"[2 * right + seen] for right, seen in zip(self.right, self.perceptual, strict=True))

    @property
    def lucky(self) -> bool:
        """Rewarded although a word is wrong."""
        return self.rewarded and self.first_error < len(self.kinds)


@functools.cache
def cell_names(grid: int) -> tuple[str, ...]:
    """Names of the cells, row by row from the top: column letter and row number, "a1" at the upper left."""
    return tuple(f"{chr(ord('a') + column)}{row + 1}" for row in range(grid) for column in range(grid))


@functools.cache
def neighbours(grid: int) -> tuple[tuple[int, ...], ...]:
    """[cell][direction]: the next cell on the torus."""
    return tuple(
        tuple((row + down) % grid * grid + (column + along) % grid for down, along in _OFFSETS)
        for row in range(grid)
        for column in range(grid)
    )


@functools.cache
def _cell_of(grid: int) -> dict[str, int]:
    return {name: cell for cell, name in enumerate(cell_names(grid))}


def walk_path(
    grid: int, start: int, directions: Sequence[int], steps: int, moves: Sequence[int] = ()
) -> tuple[int, ...]:
    """The steps + 1 cells of the true walk; arguments as ``walk_truth``."""
    path, following = [start], neighbours(grid)
    for step in range(steps):
        path.append(following[path[-1]][moves[step] if len(moves) else directions[path[-1]]])
    return tuple(path)


def walk_truth(
    words: Sequence[str], grid: int, start: int, directions: Sequence[int], steps: int, moves: Sequence[int] = ()
) -> Truth:
    """The truth of a response.

    Args:
        words: of the response, without the end token.
        grid: cells per side.
        start: index of the first cell; cells are counted row by row from the top.
        directions: [grid * grid] the arrow in each cell, an index of ``DIRECTIONS``. Not read if there are ``moves``.
        steps: of the walk.
        moves: [steps] the directions that the question names; empty if the image has them.
    """
    following, cell_of = neighbours(grid), _cell_of(grid)
    seen = len(moves) == 0  # arrays have no truth value
    at = said = start  # the cell that the text leads to; the cell that the text named last
    region, right = list[int](), list[bool]()
    readable = len(words) == 4 * steps + 2
    for position, word in enumerate(words[: 4 * steps]):
        slot, step = position % 4, position // 4
        wanted = -1
        if slot == 0:
            fits = can_read = word in FILLERS
        elif slot == 1:
            cell = cell_of.get(word)
            fits, can_read = cell == at, cell is not None
            said = at if cell is None else cell
        elif slot == 2:
            move = directions[said] if seen else moves[step]
            read = _DIRECTION_OF.get(word)
            fits, can_read = read == move, read is not None
            wanted = said if seen else -1
            at = following[said][move if read is None else read]
        else:
            fits = can_read = word == COMMA
        right.append(fits)
        region.append(wanted)
        readable = readable and can_read
    answered = -1
    for position, word in enumerate(words[4 * steps :]):
        if position == 0:
            fits = can_read = word == ANSWER
        elif position == 1:
            answered = cell_of.get(word, -1)
            fits, can_read = answered == at, answered >= 0
        else:
            fits = can_read = False
        right.append(fits)
        region.append(-1)
        readable = readable and can_read
    kinds = _kinds(steps, len(words))
    return Truth(
        kinds=kinds,
        perceptual=tuple(seen and kind == "direction" for kind in kinds),
        region=tuple(region),
        right=tuple(right),
        first_error=right.index(False) if False in right else len(right),
        readable=readable,
        rewarded=readable and answered == walk_path(grid, start, directions, steps, moves)[-1],
    )


@functools.lru_cache(maxsize=4096)
def _kinds(steps: int, length: int) -> tuple[str, ...]:
    whole = (*_STEP * steps, "answer", "answer cell")
    return (*whole[:length], *("end",) * (length - len(whole)))
