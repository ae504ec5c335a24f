"""Which rows a limit selects."""

from __future__ import annotations

import pytest

from ultrafuser.errors import DataError
from ultrafuser.evaluate.sampling import draw_rows

ROWS = list(range(100))


def test_a_limit_draws_by_the_seed_and_grows_by_adding():
    few, many = draw_rows(ROWS, 10, 3, "task"), draw_rows(ROWS, 30, 3, "task")
    assert set(few) < set(many) and few == sorted(few) and len(few) == 10
    assert draw_rows(ROWS, 10, 4, "task") != few
    assert draw_rows(ROWS, None, 3, "task") == draw_rows(ROWS, 1000, 3, "task") == ROWS


def test_a_seed_keeps_its_selection():
    """Stored answers and published numbers belong to these rows."""
    assert draw_rows(ROWS, 5, 0, "task") == [7, 8, 11, 23, 48]


@pytest.mark.parametrize(("rows", "limit"), [(ROWS, 0), ([], None), ([], 3)])
def test_a_selection_of_nothing_is_an_error(rows: list[int], limit: int | None):
    with pytest.raises(DataError, match=rf"task: zero samples \(limit {limit}, {len(rows)} rows\)"):
        draw_rows(rows, limit, 0, "task")
