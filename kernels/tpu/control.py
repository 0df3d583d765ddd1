# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Loops and scalars inside kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


def for_each(lower: Any, upper: Any, act: Callable[[Any], None]) -> None:
    """Calls `act` with each integer from lower to upper - 1."""

    def body(i: Any, _: None) -> None:
        act(i)

    lax.fori_loop(lower, upper, body, None)


def largest(scalars: Sequence[Any]) -> Any:
    """The largest of some scalars."""
    return reduce(jnp.maximum, scalars)


def if_then_else(condition: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Calls one of two functions."""
    pl.when(condition)(then)
    pl.when(jnp.logical_not(condition))(otherwise)
