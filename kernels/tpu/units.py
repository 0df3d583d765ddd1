# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The tokens of a batch as a list of units, which a kernel for TPU takes one step after another.

The tokens that the sequences of a batch see are cut into units of a few pages, and all units of all sequences
form one list. A step of the kernel takes the next `lanes` units of the list. A grid step covers a group of
sequences; a step never mixes groups, and what is missing to a full step at a group's end are units without
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from .control import quotient
from .shapes import SUBLANES, padded


@dataclass(frozen=True)
class Units:
    """How the list is cut.

    Attributes:
        seqs: sequences in a group.
        num_groups: groups of the batch.
        table_row: entries of a sequence's row in the page table; a group's fill a multiple of TABLE_TILE.
        lanes: units in a step.
        pages: pages in a unit, at most.
        page_size: tokens in a page.
        depth: steps that have a place in VMEM: the one in use and those under way. At least 2, and with
            depth * lanes <= seqs, so that what has been described is of this group or the next.
        sliding_window: tokens that a query sees; None for all.
        queries: of a sequence, its last tokens, at most.
        new_tokens: of a sequence, its last ones, whose rows are put in after they have been fetched; the unit
            that they are in is never FULL.
    """

    seqs: int
    num_groups: int
    table_row: int
    lanes: int
    pages: int
    page_size: int
    depth: int
    sliding_window: int | None
    queries: int = 1
    new_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in a unit, at most."""
        return self.pages * self.page_size

    def check(self) -> None:
        """Checks what the list takes of scalar memory.

        Raises:
            ValueError: too much; the message says how much and of what.
        """
        by_sequence = self.num_groups * self.seqs * (1 + self.new_tokens)  # lengths, and slots
        needed = 4 * (self.table_size + padded(by_sequence, SMEM_TILE))
        if needed > SMEM_BYTES:
            raise ValueError(
                f"block_sizes: groups of {self.seqs} sequences (lanes={self.lanes} x depth={self.depth}) "
                f"of up to {self.table_row} pages need {needed} bytes of scalar memory, which has "
                f"{SMEM_BYTES}; use fewer lanes, less depth or larger pages"
            )

    @property
    def table_group(self) -> int:
        """Entries of a group's rows in the page table."""
        return self.seqs * self.table_row

    @property
    def table_size(self) -> int:
        """Entries of the tables in scalar memory, and what a unit at their end may look at behind it."""
        return TABLES * self.table_group + self.pages

    def lowest(self, kv_len: Any) -> Any:
        """The first position that a sequence's queries see, or one before it."""
        if self.sliding_window is None:
            return jnp.int32(0)
        return jnp.maximum(kv_len - self.sliding_window - (self.queries - 1), 0)

    def first_page(self, kv_len: Any) -> Any:
        """The page of that position."""
        return quotient(self.lowest(kv_len), self.page_size)


TABLES = 3  # groups whose rows of the page table are in scalar memory: this one, the next, one under way
SMEM_BYTES = 2**20  # of a TensorCore
TABLE_TILE = 1024  # entries; how one-dimensional int32 arrays are tiled in HBM
SMEM_TILE = 4096  # entries left for small arrays, by which lengths are rounded up


def most_seqs(pages_per_seq: int, num_seqs: int) -> int:
    """Sequences of a group at most, so that their rows of the page table fit scalar memory."""
    entries = SMEM_BYTES // 4 - padded(num_seqs, SMEM_TILE) - pages_per_seq
    return entries // TABLES // padded(pages_per_seq) // SUBLANES * SUBLANES
