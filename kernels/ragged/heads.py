# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""From rows by token, which copies move, to columns by KV head, which products take, and back.

All of a token's heads lie in a register, a head in one sublane, or two of bfloat16 in the halves of one. They
go through memory, where a load with a stride collects the same word of many tokens, so that nothing is moved
within registers. Eight rows whose distance is a multiple of eight would lie in the same bank of that memory
and take several loads; so the words of two tokens are interleaved, and a row is left out after them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tpu.shapes import LANES, SUBLANES, padded

LANES_AT_ONCE = 256  # columns that are taken into the softmax at once, if a KV head has that many or more


@dataclass(frozen=True)
class Heads:
    """The order of a KV head's columns: [2, group / packed, q_tokens / 2, packed].

    Tokens of even places come before those of odd ones.

    Attributes:
        num_kv_heads, group: KV heads, and query heads of each.
        q_tokens: of a block, at most; even.
        packed: heads that share a word, 1 or 2.
    """

    num_kv_heads: int
    group: int
    q_tokens: int
    packed: int

    @classmethod
    def of(cls, num_kv_heads: int, group: int, q_tokens: int, num_bytes: int) -> Heads:
        """For queries and output whose numbers have 2 or 4 bytes."""
        return cls(num_kv_heads, group, q_tokens, 2 if num_bytes == 2 and group % 2 == 0 else 1)

    @property
    def columns(self) -> int:
        """Of a KV head."""
        return self.group * self.q_tokens

    @property
    def together(self) -> int:
        """Columns whose words lie at one distance."""
        return self.q_tokens // 2 * self.packed

    @property
    def at_once(self) -> int:
        """Columns that are taken into the softmax at once: whole multiples of `together`."""
        columns = max(LANES_AT_ONCE, self.together)
        return columns if self.columns % columns == 0 else self.columns

    @property
    def words(self) -> int:
        """Of a token."""
        return self.num_kv_heads * self.group // self.packed

    @property
    def scratch_rows(self) -> int:
        """Rows of 32-bit words for a block."""
        return padded(self.q_tokens // 2 * (2 * self.words + 1), SUBLANES)

    def scratch(self, numbers: int) -> Any:
        """Memory for a block's words; numbers in parts of at most LANES, as only those have a stride."""
        parts = -(-numbers // LANES)
        return pltpu.VMEM(
            (parts, self.scratch_rows, numbers // parts), jnp.uint32 if self.packed == 2 else jnp.float32
        )

    def token(self, column: Any) -> Any:
        """The place in the block of a column's token."""
        odd = jnp.where(column < self.columns // 2, 0, 1)
        return lax.rem(column, self.together) // self.packed * 2 + odd

    def by_column(self, numbers: Any) -> Any:
        """[num_q_heads] -> [num_kv_heads, 1, columns]."""
        of_head = self.group // self.packed
        pairs = numbers.reshape(self.num_kv_heads, 1, of_head, 1, self.packed)
        spread = jnp.broadcast_to(pairs, (self.num_kv_heads, 2, of_head, self.q_tokens // 2, self.packed))
        return spread.reshape(self.num_kv_heads, 1, self.columns)

    def take(self, rows: Any, words: Any) -> None:
        """Puts rows [q_tokens, num_q_heads, numbers] in VMEM into words."""
        for token in range(self.q_tokens):
            row = rows[token]
            row = pltpu.bitcast(row, jnp.uint32) if self.packed == 2 else row.astype(jnp.float32)
            for first, place in self._row(token):
                _write(words, place, row[first : first + place.size])

    def columns_of(self, head: int, columns: slice, words: Any) -> Any:
        """Some of a KV head's columns, [columns, numbers], from words: whole multiples of `together`."""
        places = self._columns(head, 0) + self._columns(head, 1)
        places = places[columns.start // self.together : columns.stop // self.together]
        found = [_read(words, place) for place in places]
        found = [pltpu.bitcast(piece, jnp.bfloat16) for piece in found] if self.packed == 2 else found
        return jnp.concatenate(found)

    def put(self, columns: Callable[[int, slice], Any], words: Any, rows: Any) -> None:
        """Turns columns back into rows.

        Args:
            columns: gives some of a KV head's columns, [these, numbers].
            words: to work in.
            rows: [q_tokens, num_q_heads, numbers] in VMEM.
        """
        half = self.columns // 2
        for odd in (0, 1):  # the rows of even tokens are written beside the columns of odd ones
            for head in range(self.num_kv_heads):
                numbers, places = columns(head, slice(odd * half, (odd + 1) * half)), self._columns(head, odd)
                size = half // len(places)
                for i, place in enumerate(places):
                    piece = numbers[i * size : (i + 1) * size]
                    piece = pltpu.bitcast(piece, jnp.uint32) if self.packed == 2 else piece
                    _write(words, place, piece.astype(words.dtype))
            for token in range(odd, self.q_tokens, 2):
                row = jnp.concatenate([_read(words, place) for _, place in self._row(token)])
                row = pltpu.bitcast(row, jnp.bfloat16) if self.packed == 2 else row
                rows[token] = row.astype(rows.dtype)

    def unpacked(self, numbers: Any, pairs: Any) -> Any:
        """Half a KV head's columns, [columns / 2, numbers] float32, in the order without shared words.

        Args:
            pairs: as many in VMEM, to work in.
        """
        if self.packed == 1:
            return numbers
        pairs[...] = numbers
        starts = [i * self.q_tokens + half for i in range(self.group // 2) for half in (0, 1)]
        return jnp.concatenate([pairs[pl.ds(start, self.q_tokens // 2, stride=2)] for start in starts])

    def _row(self, token: int) -> list[tuple[int, Any]]:
        """The first words of pieces of a token's row, and where in the words they lie."""
        firsts = range(0, self.words, SUBLANES)
        return [
            (first, pl.ds(self._place(token, first), min(SUBLANES, self.words - first), stride=2))
            for first in firsts
        ]

    def _columns(self, head: int, odd: int) -> list[Any]:
        """Where a KV head's words of the even or odd tokens lie, in the order of its columns."""
        of_head = self.group // self.packed
        words = range(head * of_head, (head + 1) * of_head)
        stride = 2 * self.words + 1
        return [pl.ds(self._place(odd, word), self.q_tokens // 2, stride=stride) for word in words]

    def _place(self, token: int, word: int) -> int:
        return token // 2 * (2 * self.words + 1) + 2 * word + token % 2


def _read(words: Any, place: Any) -> Any:
    """Rows of `Heads.scratch`, [rows, numbers]."""
    return jnp.concatenate([words[i, place] for i in range(words.shape[0])], axis=1)


def _write(words: Any, place: Any, rows: Any) -> None:
    """Writes rows of `Heads.scratch`."""
    parts, _, size = words.shape
    for i in range(parts):
        words[i, place] = rows[:, i * size : (i + 1) * size]
