"""Walks over a grid of arrows: a task in which it is known which word of a response must look where.

A scene has one arrow in each cell of a grid, in a random colour that is never asked for. The grid is a torus: a step
over an edge enters from the opposite one. The question names a start cell and a number of steps, each step follows the
arrow in the cell, and the answer is the cell at the end. With ``moves="text"`` the question has the moves and there is
no image. ``walk_truth`` has the form of a response and what is true of each of its words. Nothing here imports torch.
"""

import functools
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from sayo_verl.errors import SayoError
from sayo_verl.scenes.drawing import BACKGROUND, COLOURS, add_clutter, add_noise
from sayo_verl.scenes.walk_truth import (
    ANSWER,
    COMMA,
    DIRECTIONS,
    FILLERS,
    MAX_GRID,
    Truth,
    cell_names,
    neighbours,
    walk_truth,
)

COLOUR_NAMES = tuple(COLOURS)
_BLIND_TRIES = 50  # of a random path, before the next cells are chosen so that it does not get stuck


@dataclass(frozen=True)
class WalkConfig:
    """What is drawn and asked.

    Attributes:
        grid: cells per side.
        steps, min_steps: most and fewest steps of a walk; ``min_steps=0``: all walks have ``steps``.
        cell_pixels: side of a cell; 32 is one visual token of the tiny policy and of Qwen3-VL.
        look_alikes: share of arrows with a small head, whose two ends are hard to tell apart.
        colours: colours of the arrows, the first of ``drawing.COLOURS``.
        jitter: how far an arrow may be from the middle of its cell, in pixels, along each axis.
        clutter: grey strokes on the background, if there is room.
        noise: deviation of the noise, in levels of 255.
        moves: where the moves of the walk are: arrows in the image, or words of the question, without an image.
        held_out_pairs: colour and direction, such as ``"red-up"``, that no arrow has in training rows and in the
            validation rows of the same distribution.
        more_steps: steps beyond ``steps`` in the validation rows with longer walks; 0: there are no such rows.
        n_train, n_val: training rows, and rows of each kind of validation rows.
        seed: of all rows.
    """

    grid: int = 4
    steps: int = 8
    min_steps: int = 0
    cell_pixels: int = 32
    look_alikes: float = 0.0
    colours: int = 6
    jitter: int = 1
    clutter: int = 0
    noise: int = 32
    moves: Literal["image", "text"] = "image"
    held_out_pairs: tuple[str, ...] = ("red-up", "green-right", "blue-down", "yellow-left")
    more_steps: int = 4
    n_train: int = 4096
    n_val: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for names, fits, wanted in self._rules():
            if not fits:
                got = ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split(", "))
                what, fix = "no walk can be drawn", f"change {names}"
                raise SayoError("D80", what, where="WalkConfig", got=got, wanted=wanted, fix=fix)

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Fields, whether they fit, what fits; a rule may rely on those before it."""
        yield "grid", 3 <= self.grid <= MAX_GRID, f"3 to {MAX_GRID}"
        most = self.grid**2 - 1  # a path visits no cell twice
        yield "steps, grid", 1 <= self.steps <= most, f"steps from 1 to {most}"
        yield "min_steps, steps", 0 <= self.min_steps <= self.steps, f"min_steps from 0 to {self.steps}"
        longer = 0 <= self.more_steps <= most - self.steps
        yield "more_steps, steps, grid", longer, f"more_steps from 0 to {most - self.steps}"
        yield "cell_pixels", 16 <= self.cell_pixels <= 64, "16 to 64"
        yield "jitter, cell_pixels", 0 <= self.jitter <= self.cell_pixels // 8, f"0 to {self.cell_pixels // 8}"
        yield "look_alikes", 0 <= self.look_alikes <= 1, "0 to 1"
        yield "colours", 1 <= self.colours <= len(COLOURS), f"1 to {len(COLOURS)}"
        yield "clutter", 0 <= self.clutter <= 64, "0 to 64"
        yield "noise", 0 <= self.noise <= 64, "0 to 64"
        yield "moves", self.moves in ("image", "text"), "'image' or 'text'"
        yield "n_train, n_val", min(self.n_train, self.n_val) >= 1, "at least 1"
        known = {f"{colour}-{way}" for colour in COLOUR_NAMES[: self.colours] for way in DIRECTIONS}
        named = set(self.held_out_pairs) <= known
        yield "held_out_pairs, colours", named, "colour-direction, such as red-up, of the first colours"
        yield "held_out_pairs", all(self.colours_of(new=False)), "a colour left for each direction"

    @functools.cached_property
    def pairs(self) -> frozenset[tuple[int, int]]:
        """``held_out_pairs`` as indices of colour and direction."""
        split = (pair.split("-") for pair in self.held_out_pairs)
        return frozenset((COLOUR_NAMES.index(colour), DIRECTIONS.index(way)) for colour, way in split)

    def colours_of(self, *, new: bool) -> tuple[tuple[int, ...], ...]:
        """[direction]: the colours that are held out for it, or those that are not."""
        return tuple(
            tuple(c for c in range(self.colours) if ((c, way) in self.pairs) == new) for way in range(len(DIRECTIONS))
        )


@dataclass(frozen=True)
class Walk:
    """A scene and its question. Cells are counted row by row from the top.

    Attributes:
        image: RGB, ``grid * cell_pixels`` pixels square; None where the question has the moves.
        question, answer: the text, and the name of the last cell.
        grid: cells per side.
        start: the first cell.
        directions, colours: [grid * grid] indices of ``DIRECTIONS`` and of ``COLOUR_NAMES``.
        path: [steps + 1] the cells of the walk; the last one answers.
        boxes: [steps] the cells whose arrows the walk follows, in their order, as ``(x0, y0, x1, y1)`` in pixels, x1
            and y1 exclusive; empty without an image.
        moves: [steps] the directions that the question names; empty with an image.
    """

    image: Image.Image | None
    question: str
    answer: str
    grid: int
    start: int
    directions: tuple[int, ...]
    colours: tuple[int, ...]
    path: tuple[int, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    moves: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.path) - 1

    def truth(self, words: list[str]) -> Truth:
        """The truth of a response to this walk."""
        return walk_truth(words, self.grid, self.start, self.directions, self.steps, self.moves)


def sample_walk(rng: random.Random, config: WalkConfig, *, longer: bool = False, new_pairs: bool = False) -> Walk:
    """A random walk.

    Args:
        rng: the walk depends on its state and the arguments alone.
        config: what is drawn and asked.
        longer: the walk has ``more_steps`` more than the longest one of the configuration.
        new_pairs: arrows of the path have a held-out colour if their direction has one, other arrows any colour.
    """
    grid, steps = config.grid, config.steps
    if longer:
        steps += config.more_steps
    elif config.min_steps:
        steps = rng.randint(config.min_steps, steps)
    path = _path(rng, grid, steps)
    following = neighbours(grid)
    directions = [rng.randrange(4) for _ in range(grid**2)]
    for here, there in itertools.pairwise(path):
        directions[here] = following[here].index(there)
    known, new = config.colours_of(new=False), config.colours_of(new=True)
    on_path, any_colour = set(path[:-1]), range(config.colours)
    colours = [
        rng.choice((new[way] or known[way]) if cell in on_path else any_colour) if new_pairs else rng.choice(known[way])
        for cell, way in enumerate(directions)
    ]
    names, side = cell_names(grid), config.cell_pixels
    moves = tuple(directions[cell] for cell in path[:-1]) if config.moves == "text" else ()
    asked = " ".join(DIRECTIONS[way] for way in moves) or f"{steps} steps"
    corners = ((cell % grid * side, cell // grid * side) for cell in (() if moves else path[:-1]))
    return Walk(
        image=None if moves else Image.fromarray(_draw(rng, config, directions, colours)),
        question=f"Start at {names[path[0]]} . Walk {asked} .",
        answer=names[path[-1]],
        grid=grid,
        start=path[0],
        directions=tuple(directions),
        colours=tuple(colours),
        path=tuple(path),
        boxes=tuple((x, y, x + side, y + side) for x, y in corners),
        moves=moves,
    )


def demonstration(walk: Walk, rng: random.Random, slip: float = 0.0) -> list[str]:
    """The words of a response.

    Args:
        walk: what is answered.
        rng: chooses fillers and slips.
        slip: share of directions that are replaced by a random one, which may be the same. The walk goes on from there.
    """
    names, following = cell_names(walk.grid), neighbours(walk.grid)
    at, words = walk.start, list[str]()
    for step in range(walk.steps):
        way = walk.moves[step] if walk.moves else walk.directions[at]
        if rng.random() < slip:
            way = rng.randrange(4)
        words += [rng.choice(FILLERS), names[at], DIRECTIONS[way], COMMA]
        at = following[at][way]
    return [*words, ANSWER, names[at]]


def _path(rng: random.Random, grid: int, steps: int) -> list[int]:
    """steps + 1 cells, each once. Long paths get stuck often; then each step goes where the fewest ways lead on."""
    following, tries = neighbours(grid), 0
    while True:
        path = [rng.randrange(grid**2)]
        left = set(range(grid**2)) - set(path)
        while len(path) <= steps:
            free = [cell for cell in following[path[-1]] if cell in left]
            if not free:
                break
            if tries >= _BLIND_TRIES:
                rng.shuffle(free)
                free.sort(key=lambda cell: sum(way in left for way in following[cell]))
                path.append(free[0])
            else:
                path.append(rng.choice(free))
            left.discard(path[-1])
        if len(path) > steps:
            return path
        tries += 1


@functools.cache
def arrow(direction: int, side: int, blunt: bool) -> np.ndarray:
    """bool [side, side]: the pixels of an arrow in the middle of its cell; ``blunt``: with a small head."""
    rows, columns = (np.mgrid[:side, :side] - (side - 1) / 2) * (16 / side)  # in sixteenths of the cell
    across = np.abs(columns)
    shaft = (across <= 1.6) & (np.abs(rows) <= 5.5)
    below_tip = rows + 5.5
    head = (below_tip >= 0) & (below_tip <= (3.0 if blunt else 5.5)) & (across <= 0.9 * below_tip + 0.5)
    shape = np.rot90(head | shaft, -direction)
    shape.setflags(write=False)
    return shape


def _draw(rng: random.Random, config: WalkConfig, directions: list[int], colours: list[int]) -> np.ndarray:
    """uint8 [grid * cell_pixels, grid * cell_pixels, 3]."""
    side, grid, jitter = config.cell_pixels, config.grid, config.jitter
    image = np.full((grid * side, grid * side, 3), BACKGROUND, np.uint8)
    for cell, (direction, colour) in enumerate(zip(directions, colours, strict=True)):
        blunt = rng.random() < config.look_alikes
        y, x = (at * side + rng.randint(-jitter, jitter) for at in divmod(cell, grid))
        y0, x0 = max(y, 0), max(x, 0)
        y1, x1 = min(y + side, grid * side), min(x + side, grid * side)
        covered = arrow(direction, side, blunt)[y0 - y : y1 - y, x0 - x : x1 - x]
        image[y0:y1, x0:x1][covered] = COLOURS[COLOUR_NAMES[colour]]
    if config.clutter:
        add_clutter(image, rng, config.clutter)
    return add_noise(image, rng, config.noise) if config.noise else image
