"""What a device's memory is taken by, and how much cache is left room for. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """A device's memory, in bytes.

    The cache takes what an engine would give it: a share of what weights and rows leave
    (`runtime.cache_size.choose_num_pages`), or less if the steps need more than the rest.

    Attributes:
        capacity: that the compiler lets programs use.
        weights: the device's own.
        row_state: what is remembered of the rows of the batch.
        temporaries: of the step that needs most.
        program: the steps' code.
        page: one page of the cache, in all layers.
        page_size: tokens per page.
        utilization: the share.
    """

    capacity: int
    weights: int
    row_state: int
    temporaries: int
    program: int
    page: int
    page_size: int
    utilization: float

    @property
    def left(self) -> int:
        """Beside everything but the cache; negative if that does not fit."""
        return self.capacity - self.weights - self.row_state - self.temporaries - self.program

    @property
    def num_pages(self) -> int:
        """That the cache has room for."""
        share = int((self.capacity - self.weights - self.row_state) * self.utilization)
        return max(0, min(share, self.left) // self.page)

    @property
    def cache(self) -> int:
        return self.num_pages * self.page

    @property
    def tokens(self) -> int:
        """In whole pages."""
        return self.num_pages * self.page_size

    def sequences(self, context: int) -> int:
        """Of so many tokens each, none of them shared."""
        return self.num_pages // -(-context // self.page_size)

    def holds(self, batch: int, context: int) -> bool:
        """Whether so many sequences of so many tokens fit."""
        return self.sequences(context) >= batch
