"""The type of what a pytree of this room holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

    Leaf = jax.Array
else:  # a leaf may also be a NumPy array or a ShapeDtypeStruct
    Leaf = Any
