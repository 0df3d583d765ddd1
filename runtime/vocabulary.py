"""What a device knows of the vocabulary: the part whose logits it holds, and how parts are put together.

Sampling, shaping and log-probabilities are written for the part of one device. What they need of all parts
are sums, maxima and a few candidates per row: nothing as long as the vocabulary ever leaves its device.
"""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class VocabularyPart:
    """An equal part of the vocabulary per device, in order.

    Attributes:
        axes: of the mesh, within a shard_map over them: the vocabulary is split over them; none if this
            device has all of it.
    """

    axes: tuple[str, ...] = ()

    def first(self, size: int) -> Int[Array, ""]:
        """The first token of a part of `size` tokens."""
        return self.number() * size

    def number(self) -> Int[Array, ""]:
        """Which part this is."""
        return lax.axis_index(self.axes) if self.axes else jnp.int32(0)

    def sum(self, array: Array) -> Array:
        """The sum over all parts."""
        return cast(Array, lax.psum(array, self.axes)) if self.axes else array

    def max(self, array: Array) -> Array:
        """The largest over all parts."""
        return cast(Array, lax.pmax(array, self.axes)) if self.axes else array

    def min(self, array: Array) -> Array:
        """The smallest over all parts."""
        return cast(Array, lax.pmin(array, self.axes)) if self.axes else array

    def of_each(self, array: Array) -> Array:
        """[parts, ...], what each part has."""
        return cast(Array, lax.all_gather(array, self.axes)) if self.axes else array[None]

    def places(self, tokens: Int[Array, "*shape"], size: int) -> Int[Array, "*shape"]:
        """Where tokens stand in a part of `size` tokens; `size`, out of bounds, for all others."""
        places = tokens - self.first(size)
        return jnp.where((places >= 0) & (places < size), places, size)

    def at(self, values: Float[Array, "n part"], tokens: Int[Array, " n"]) -> Float[Array, " n"]:
        """The value at a token in each row, whichever part it lies in."""
        size = values.shape[1]
        places = self.places(tokens, size)
        found = jnp.take_along_axis(values, jnp.minimum(places, size - 1)[:, None], 1)[:, 0]
        return self.max(jnp.where(places < size, found, -jnp.inf))


WHOLE = VocabularyPart()
