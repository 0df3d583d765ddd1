"""Which pages of the cache are free. Plain Python; the pages themselves live on the device."""

from __future__ import annotations


class PagePool:
    """Hands out pages and takes them back.

    Args:
        num_pages: pages in the cache.
        page_size: tokens per page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.clear()

    def clear(self) -> None:
        """Takes all pages back."""
        self._free = list(range(self.num_pages))[::-1]
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def can_allocate(self, num_pages: int) -> bool:
        return num_pages <= len(self._free)

    def allocate(self, num_pages: int) -> list[int]:
        """Takes pages out of the pool.

        Raises:
            ValueError: there are not as many; ask `can_allocate` first.
        """
        if not self.can_allocate(num_pages):
            raise ValueError(f"num_pages={num_pages}: only {self.num_free} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(num_pages)]
        self._used.update(pages)
        return pages

    def release(self, pages: list[int]) -> None:
        """Gives pages back.

        Raises:
            ValueError: a page that is not in use.
        """
        if not self._used.issuperset(pages) or len(set(pages)) != len(pages):
            raise ValueError(f"pages={pages}: not all of them are in use")
        self._used.difference_update(pages)
        self._free.extend(pages)

    def check_integrity(self) -> None:
        """Proves that every page is either free or in use, and none is both.

        Raises:
            RuntimeError: a page was lost or doubled.
        """
        free = set(self._free)
        whole = free | self._used == set(range(self.num_pages))
        if not whole or free & self._used or len(free) != len(self._free):
            raise RuntimeError(
                f"page pool: free {sorted(free)}, used {sorted(self._used)} of {self.num_pages}"
            )
