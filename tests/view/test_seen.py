"""Words, pieces and packed maps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sayo_verl.view.maps import LEVELS, SPAN, Packed
from sayo_verl.view.seen import pieces_of, words_of


class ByteTokenizer:
    """One token per byte of UTF-8, so that most characters of other scripts are several tokens."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=40))
def test_pieces_joined_are_the_decoded_response(text: str):
    ids = list(text.encode())
    pieces = pieces_of(ByteTokenizer(), ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


@given(st.lists(st.text(max_size=6), max_size=12))
def test_words_cover_every_token_once(pieces: list[str]):
    words = words_of(pieces)
    assert [t for start, end in words for t in range(start, end)] == list(range(len(pieces)))
    assert all(start < end for start, end in words)


def test_a_word_starts_after_white_space_and_at_a_script_without_it():
    assert words_of(["The", " re", "d", " box", ".\n", "It"]) == ((0, 1), (1, 3), (3, 5), (5, 6))
    assert words_of(["红", "色", "的"]) == ((0, 1), (1, 2), (2, 3))


def test_a_special_token_is_a_word_of_its_own():
    pieces = ["red", ".", "</think>", "<answer>", "red", "<|im_end|>"]
    assert words_of(pieces) == ((0, 6),)
    assert words_of(pieces, alone={2, 3, 5}) == ((0, 2), (2, 3), (3, 4), (4, 5), (5, 6))


@pytest.mark.parametrize("levels", LEVELS)
def test_a_packed_map_is_as_exact_as_its_levels(levels: int):
    maps_WV = (np.random.default_rng(0).random((5, 40)) ** 8).astype(np.float32)
    packed = Packed.of(maps_WV, levels)
    back_WV = Packed.from_json(packed.to_json()).unpack()
    step = SPAN ** (0.5 / (levels - 1)) * (1 + 1e-5)
    kept = maps_WV > maps_WV.max() / SPAN * step
    assert kept.sum() > 100
    assert back_WV.max() == pytest.approx(maps_WV.max(), rel=1e-6)
    assert (back_WV[kept] / maps_WV[kept] < step).all()
    assert (maps_WV[kept] / back_WV[kept] < step).all()
    assert (back_WV[~kept] <= maps_WV.max() / SPAN * step**2).all()


def test_an_empty_map_stays_empty():
    assert not Packed.of(np.zeros((2, 3))).unpack().any()
    assert Packed.of(np.zeros((0, 3))).unpack().shape == (0, 3)
