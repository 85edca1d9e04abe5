"""Packing loses nothing, keeps bounds, and best fit needs as few rows as an independent best-fit-decreasing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cheapertraining.data.packing import PACKINGS, Rows, pack
from cheapertraining.errors import UserError


def pieces_by_row(rows: Rows) -> list[list[tuple[int, int, int]]]:
    flat = list(zip(rows.document.tolist(), rows.offset.tolist(), rows.length.tolist(), strict=True))
    return [flat[a:b] for a, b in zip(rows.row_start[:-1], rows.row_start[1:], strict=True)]


@given(
    lengths=st.lists(st.integers(1, 70), max_size=60),
    seq_len=st.integers(1, 32),
    packing=st.sampled_from(PACKINGS),
)
@settings(max_examples=200, deadline=None)
def test_every_token_lands_in_exactly_one_piece(lengths: list[int], seq_len: int, packing: str) -> None:
    rows = pack(np.array(lengths, np.int64), seq_len, packing)
    covered = [np.zeros(length, int) for length in lengths]
    for row in pieces_by_row(rows):
        assert row
        assert sum(length for _, _, length in row) <= seq_len
        for document, offset, length in row:
            covered[document][offset : offset + length] += 1
    assert all((times == 1).all() for times in covered)
    assert rows.tokens == sum(lengths)
    assert rows.padding == len(rows) * seq_len - sum(lengths)
    if packing == "best_fit":
        assert rows.cut_documents == sum(length > seq_len for length in lengths)


def reference_best_fit_rows(lengths: list[int], seq_len: int) -> int:
    """Textbook best-fit decreasing: scan all open rows for the fullest that fits."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= length
        else:
            spaces.append(seq_len - length)
    return len(spaces)


@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=80))
@settings(max_examples=100, deadline=None)
def test_best_fit_needs_as_many_rows_as_the_textbook(lengths: list[int]) -> None:
    assert len(pack(np.array(lengths, np.int64), 32)) == reference_best_fit_rows(lengths, 32)


def test_concat_pads_only_the_last_row() -> None:
    rows = pack(np.array([5, 9, 3], np.int64), 8, "concat")
    assert pieces_by_row(rows) == [[(0, 0, 5), (1, 0, 3)], [(1, 3, 6), (2, 0, 2)], [(2, 2, 1)]]


def test_bad_packing() -> None:
    with pytest.raises(UserError, match="Did you mean 'best_fit'"):
        pack(np.array([1], np.int64), 8, "bestfit")
    with pytest.raises(UserError, match="at least 1"):
        pack(np.array([0], np.int64), 8)
