# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The two products of attention when each KV head has only a few query rows, inside a kernel for TPU.

The matrix unit is then busy taking in keys and values, not multiplying. A stream is one KV head of one unit
of tokens. Two streams are put side by side in one product, keys [tokens, 2 * head_dim], against queries that
are zero in the other stream's half: so the same keys and values fill a matrix unit that is 256 wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from .products import dot


@dataclass(frozen=True)
class Products:
    """Products of the rows of several streams.

    Attributes:
        rows: query rows of a stream.
        head_dim: numbers per head.
        dtype: of the factors, bfloat16 or float32; sums are float32.
    """

    rows: int
    head_dim: int
    dtype: Any

    def scores(self, queries: Any, keys: list[Any]) -> Any:
        """Each stream's query rows against its keys.

        Args:
            queries: [streams * rows, head_dim].
            keys: per stream [tokens, head_dim]. What is not finite in one spoils the scores of the stream
                beside it: zero times that is NaN.

        Returns:
            [streams * rows, tokens].
        """
        if len(keys) % 2:
            return self._by_operand(queries, keys, contract=1)
        twice = jnp.concatenate([queries, queries], axis=1)
        stream = lax.broadcasted_iota(jnp.int32, twice.shape, 0) // self.rows
        half = lax.broadcasted_iota(jnp.int32, twice.shape, 1) // self.head_dim
        halves = jnp.where(stream % 2 == half, twice, jnp.zeros_like(twice))
        return self._by_operand(halves, side_by_side(keys), contract=1)

    def weighted(self, weights: Any, values: list[Any]) -> Any:
        """Sums of each stream's values with its rows' weights.

        Args:
            weights: [streams * rows, tokens].
            values: per stream [tokens, head_dim]; finite.

        Returns:
            [streams * rows, head_dim].
        """
        if len(values) % 2:
            return self._by_operand(weights, values, contract=0)
        both = self._by_operand(weights, side_by_side(values), contract=0)
        stream = lax.broadcasted_iota(jnp.int32, (both.shape[0], self.head_dim), 0) // self.rows
        return jnp.where(stream % 2 == 0, both[:, : self.head_dim], both[:, self.head_dim :])

    def _by_operand(self, rows: Any, operands: list[Any], *, contract: int) -> Any:
        """The last axis of consecutive rows with axis `contract` of one operand each."""
        count = rows.shape[0] // len(operands)
        parts = (rows[i * count : (i + 1) * count] for i in range(len(operands)))
        return jnp.concatenate(
            [
                dot(part, operand, contract=(1, contract))
                for part, operand in zip(parts, operands, strict=True)
            ]
        )


def side_by_side(operands: list[Any]) -> list[Any]:
    """[tokens, head_dim] each -> half as many [tokens, 2 * head_dim]."""
    return [jnp.concatenate(operands[i : i + 2], axis=1) for i in range(0, len(operands), 2)]
