"""The page pool by itself; with a scheduler it is in test_scheduler.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vsurge.runtime.page_pool import PagePool, chained

KEYS = [b"a", b"b", b"c"]


def pool_with_a_prefix() -> PagePool:
    """Of four pages, of which three are kept for KEYS."""
    pool = PagePool(4, 4)
    pages = pool.allocate(3)
    for page, key in zip(pages, KEYS, strict=True):
        pool.register(page, key)
    pool.release(pages)
    return pool


def test_a_pool_refuses_what_it_does_not_have_and_what_is_not_in_use() -> None:
    pool = PagePool(4, 4)
    pages = pool.allocate(3)
    with pytest.raises(ValueError, match="num_pages=2: only 1 of 4 are free and 0 cached"):
        pool.allocate(2)
    assert pool.num_free == 1
    for wrong in ([pages[0], pages[0]], [3], [4], [-1]):
        with pytest.raises(ValueError, match="not all of them are in use"):
            pool.release(wrong)
    pool.release(pages)
    assert (pool.num_free, pool.num_used, pool.num_cached) == (4, 0, 0)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_pages_for_rounds_up(tokens: int, pages: int) -> None:
    assert PagePool(1, 4).pages_for(tokens) == pages


def test_a_prefix_is_found_up_to_its_first_page_that_is_not_known() -> None:
    pool = pool_with_a_prefix()
    assert (pool.num_free, pool.num_used, pool.num_cached) == (1, 0, 3)
    assert pool.share([b"a", b"x", b"c"]) == [0]
    assert pool.share([b"x", b"b"]) == []
    assert pool.share(KEYS) == [0, 1, 2]
    pool.check_integrity([[0], [0, 1, 2]])
    pool.release([0])
    pool.release([0, 1, 2])
    assert pool.num_cached == 3


def test_what_is_shared_is_not_evicted_and_a_prefix_loses_its_end_first() -> None:
    pool = pool_with_a_prefix()
    shared = pool.share(KEYS[:1])
    assert pool.allocate(2) == [3, 2]
    assert pool.share(KEYS) == [0, 1]
    with pytest.raises(ValueError, match="only 0 of 4"):
        pool.allocate(1)
    assert shared == [0]


def test_of_two_pages_with_the_same_content_the_first_one_stays_known() -> None:
    pool = PagePool(4, 4)
    first, second = pool.allocate(2)
    pool.register(first, b"a")
    pool.register(second, b"a")
    assert pool.share([b"a"]) == [first]
    pool.release([second])
    assert pool.num_free == 3


def test_forgetting_leaves_the_owners_their_pages() -> None:
    pool = pool_with_a_prefix()
    pages = pool.share(KEYS[:2])
    pool.forget()
    assert (pool.num_free, pool.num_used, pool.num_cached) == (2, 2, 0)
    assert pool.share(KEYS) == []
    pool.release(pages)
    assert pool.num_free == 4


def test_a_key_stands_for_all_tokens_before_it_and_for_where_they_are() -> None:
    keys = {
        chained(previous, tokens)
        for previous in (b"", chained(b"", [1]), chained(b"", [2]), chained(b"", [1, 2]))
        for tokens in ([1], [2], [1, 2], [2, 1], [1, 1])
    }
    assert len(keys) == 20


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._free.pop(),
        lambda pool: pool._free.append(0),
        lambda pool: pool._owners.__setitem__(1, 1),
        lambda pool: pool._key_of.pop(2),
        lambda pool: pool._kept.pop(2),
    ],
)
def test_a_lost_or_doubled_page_is_noticed(damage: Callable[[PagePool], object]) -> None:
    pool = pool_with_a_prefix()
    pool.check_integrity([])
    damage(pool)
    with pytest.raises(RuntimeError, match="page pool"):
        pool.check_integrity()


def test_a_wrong_number_of_owners_is_noticed() -> None:
    pool = pool_with_a_prefix()
    pool.share(KEYS)
    with pytest.raises(RuntimeError, match="owners"):
        pool.check_integrity([[0, 1, 2], [0]])
