"""Which pages of the cache are free, used, or kept for a prefix to come. Plain Python, no JAX.

A full page is known by a key that stands for its tokens and all tokens before them (`chained`). Whoever has
the same prefix shares the page. When its last owner is gone it is kept, until pages run out: the one that was
given back first is taken first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import takewhile

KEY_BYTES = 16  # two prefixes among 2**32 share a key with a probability of 2**-65


def chained(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a page.

    Args:
        previous: the key of the page before it; of a first page, what else decides on its content.
        token_ids: its own tokens.
    """
    return blake2b(previous + array("i", token_ids).tobytes(), digest_size=KEY_BYTES).digest()


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
        """Takes all pages back, and forgets what they hold."""
        self._free = deque(range(self.num_pages))
        self._owners = [0] * self.num_pages
        self._kept: OrderedDict[int, None] = OrderedDict()  # pages with a key and no owner, oldest first
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that nobody owns and that hold a prefix."""
        return len(self._kept)

    @property
    def num_used(self) -> int:
        """Pages with owners."""
        return self.num_pages - len(self._free) - len(self._kept)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def can_allocate(self, num_pages: int) -> bool:
        return num_pages <= len(self._free) + len(self._kept)

    def allocate(self, num_pages: int) -> list[int]:
        """Takes pages out of the pool, for one owner; prefixes are forgotten where free ones do not suffice.

        Raises:
            ValueError: there are not as many; ask `can_allocate` first.
        """
        if not self.can_allocate(num_pages):
            raise ValueError(
                f"num_pages={num_pages}: only {self.num_free} of {self.num_pages} are free and "
                f"{self.num_cached} cached"
            )
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(num_pages)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """The pages that hold the longest known part of a prefix, with one owner more each.

        Args:
            keys: of the prefix's pages, in order.
        """
        pages = list[int]()
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._owners[page] += 1
            self._kept.pop(page, None)
            pages.append(page)
        return pages

    def num_known(self, keys: Iterable[bytes]) -> int:
        """Pages that `share` would find."""
        return sum(1 for _ in takewhile(self._page_of.__contains__, keys))

    def release(self, pages: Sequence[int]) -> None:
        """Takes one owner from each page of a sequence, whose last pages will be the first to be forgotten.

        Raises:
            ValueError: a page that nobody owns.
        """
        if len(set(pages)) != len(pages) or not all(
            0 <= page < self.num_pages and self._owners[page] for page in pages
        ):
            raise ValueError(f"pages={list(pages)}: not all of them are in use")
        for page in reversed(pages):
            self._owners[page] -= 1
            if not self._owners[page]:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, key: bytes) -> None:
        """Makes a full page known by its key, unless another one is."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self) -> None:
        """Forgets all prefixes: what the pages hold is valid for their owners only."""
        self._free.extend(self._kept)
        self._kept.clear()
        self._key_of.clear()
        self._page_of.clear()

    def check_integrity(self, owned: Iterable[Sequence[int]] | None = None) -> None:
        """Proves that every page is free, kept or used, just one of them, and that its owners are counted.

        Args:
            owned: the pages of every owner; None leaves the counts alone.

        Raises:
            RuntimeError: a page was lost or doubled, or has a wrong count.
        """
        free, kept = set(self._free), set(self._kept)
        used = {page for page, owners in enumerate(self._owners) if owners}
        apart = len(free) + len(kept) + len(used) == len(free | kept | used) == self.num_pages
        keys = {page: key for key, page in self._page_of.items()}
        if not apart or len(free) != len(self._free) or keys != self._key_of or not kept <= keys.keys():
            raise RuntimeError(f"page pool: free {sorted(free)}, cached {sorted(kept)}, used {sorted(used)}")
        if owned is not None:
            owners = [0] * self.num_pages
            for pages in owned:
                for page in pages:
                    owners[page] += 1
            if owners != self._owners:
                raise RuntimeError(f"page pool: {self._owners} owners counted, there are {owners}")
