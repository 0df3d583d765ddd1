"""What the ragged kernel for TPU takes into the softmax at once, and in which order.

Scores wait in vector memory until it is known how high they go: those of one item fill twice the registers
that there are. Left to the compiler they are spilled, as are the sums that their products belong to, and the
step gets longer by a fifth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from ..tpu.shapes import LANES

PIECE = 512  # tokens of an item, at most
CHUNK = 256  # tokens of a piece whose scores make one product


@dataclass(frozen=True)
class Item:
    """Some columns of a KV head and some tokens.

    Attributes:
        head: the KV head.
        columns: its columns.
        piece: the tokens.
        waiting: the first row of its scores among those that wait.
    """

    head: int
    columns: slice
    piece: slice
    waiting: int

    @property
    def parts(self) -> list[slice]:
        """The tokens of one product each: two where both fill a matrix unit."""
        whole = self.piece.stop - self.piece.start == PIECE
        return _cut(self.piece, CHUNK) if whole else [self.piece]

    def rows(self, part: slice) -> slice:
        """Where the scores of a part wait."""
        first = self.waiting + part.start - self.piece.start
        return slice(first, first + part.stop - part.start)


def items_of(width: int, num_kv_heads: int, columns: int, at_once: int) -> list[Item]:
    """All items of some tokens, in their order.

    Args:
        width: tokens.
        num_kv_heads: KV heads.
        columns, at_once: of a KV head, and those of an item.
    """
    turns, rows = _ahead(width) + 1, min(width, PIECE)
    places = [
        (head, part, piece)
        for piece in _cut(slice(0, width), PIECE)
        for head in range(num_kv_heads)
        for part in _cut(slice(0, columns), at_once)
    ]
    return [Item(*place, i % turns * rows) for i, place in enumerate(places)]


def waiting_rows(kv_tokens: int) -> int:
    """Rows of scores that wait at most, of items of up to `kv_tokens`."""
    widths = {min(kv_tokens, PIECE), min(kv_tokens, PIECE - LANES)}
    return max((_ahead(width) + 1) * width for width in widths)


def take_in_turn(
    width: int,
    items: list[Item],
    scores: Callable[[Item, slice], Any],
    add: Callable[[Item, list[Any], Callable[[int], None]], None],
) -> None:
    """Takes items one after the other.

    The compiler keeps the order of products. So an item's scores are made beside the weights of one that is
    some items before it, part by part.

    Args:
        width: tokens, as for `items_of`.
        items: from there.
        scores: makes those of a part wait, and gives their maxima.
        add: takes an item into the softmax, given the maxima of its parts and what is to be called before the
            weights of part number i.
    """
    ahead = _ahead(width)
    coming = [[scores(item, part) for part in item.parts] for item in items[:ahead]]
    for item, later in zip_longest(items, items[ahead:]):
        found = list[Any]()

        def begin_later(i: int, later: Item | None = later, found: list[Any] = found) -> None:
            if later is not None and i < len(later.parts):
                found.append(scores(later, later.parts[i]))

        add(item, coming.pop(0), begin_later)
        for i in range(len(item.parts), len(later.parts) if later else 0):
            begin_later(i)
        coming.append(found)


def _ahead(width: int) -> int:
    """How many items ahead scores are made: short ones leave the matrix unit less to do meanwhile."""
    return 3 if width >= PIECE else 4


def _cut(tokens: slice, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, tokens.stop)) for begin in range(tokens.start, tokens.stop, size)]
