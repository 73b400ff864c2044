"""Pages: who holds them, which text is found again, what goes first; and tables of them."""

from __future__ import annotations

import pytest

from compute.page_table import PAGE_TOKENS, PageTable
from compute.pages import ROOT, Pages
from compute.stage import Row

ONE, TWO, THREE = (tuple(range(start, start + PAGE_TOKENS)) for start in (0, 100, 200))


def test_a_page_is_free_held_or_kept() -> None:
    pages = Pages(4)
    (first, second) = pages.take(2)
    assert pages.num_available == 2
    pages.remember(first, ROOT, ONE)
    pages.release([first, second])
    assert (pages.num_available, pages.num_kept) == (4, 1)
    known = pages.find(ROOT, ONE)
    assert known is not None
    assert known.page == first
    assert pages.find(known.text, ONE) is None
    pages.hold(first)
    assert (pages.num_available, pages.num_kept) == (3, 0)
    with pytest.raises(ValueError, match="4 pages wanted, 3 available"):
        pages.take(4)
    with pytest.raises(ValueError, match="hold nothing"):
        Pages(0)


def test_the_end_of_a_text_goes_before_its_beginning_and_the_least_used_text_first() -> None:
    pages = Pages(4)
    old = pages.take(2)
    beginning = pages.remember(old[0], ROOT, ONE)
    pages.remember(old[1], beginning.text, TWO)
    new = pages.take(2, behind=old[-1])
    pages.remember(new[0], ROOT, THREE)
    end = pages.remember(new[1], pages.find(ROOT, THREE).text, TWO)  # type: ignore[union-attr]
    pages.release(old)
    pages.release(new)
    assert pages.take(1) == [old[1]]
    assert pages.find(beginning.text, TWO) is None
    assert pages.find(ROOT, ONE) == beginning
    assert pages.take(1) == [old[0]]
    assert pages.take(1) == [end.page]
    pages.release([old[1]])  # nothing is remembered of it any more
    assert pages.take(1) == [old[1]]


def test_one_text_is_remembered_once() -> None:
    pages = Pages(2)
    one, two = pages.take(2)
    assert pages.remember(one, ROOT, ONE) == pages.remember(two, ROOT, ONE)
    pages.release([two])
    assert pages.num_kept == 0


def test_sequences_lie_side_by_side_with_room_to_grow() -> None:
    pages = Pages(32)
    one, two = pages.take(3), pages.take(3)
    assert one == [0, 1, 2]
    assert two == [17, 18, 19]
    assert pages.take(2, behind=one[-1]) == [3, 4]
    assert pages.take(1, behind=two[-1]) == [20]
    assert pages.take(3, behind=31) == [11, 12, 13]  # no page follows


def table() -> PageTable:
    return PageTable(pages_a_slot=3, num_slots=4, num_pages=6)


def test_rows_say_where_positions_lie() -> None:
    found = table()
    assert found.numbers.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    found.follow([Row(1, (7,), 64, pages=(0, 5), first_page=1), Row(0, (7,), 0)])
    assert found.numbers[1].tolist() == [3, 0, 5]
    assert found.places(1, 62, 67).tolist() == [254, 255, 0, 1, 2]
    assert found.runs(1, 62, 130) == [slice(254, 256), slice(0, 64), slice(320, 322)]
    assert found.runs(0, 3, 150) == [slice(3, 150)]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (Row(0, (1,), 0, pages=(6,)), "pages must be 0..5"),
        (Row(0, (1,), 0, pages=(-1,)), "pages must be 0..5"),
        (Row(0, (1,), 0, pages=(1, 2), first_page=2), "beyond the 3"),
        (Row(0, (1,), 0, pages=(1,), first_page=-1), "beyond the 3"),
    ],
)
def test_rows_that_name_no_page_are_refused(row: Row, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        table().follow([row])
