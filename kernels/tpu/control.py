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


def quotient(number: Any, by: int) -> Any:
    """`number // by` of a number that is not negative: a shift, if it can be one."""
    if by & (by - 1):
        return lax.div(number, jnp.int32(by))
    return lax.shift_right_logical(number, jnp.int32(by.bit_length() - 1))


def remainder(number: Any, by: int) -> Any:
    """`number % by` of a number that is not negative."""
    return lax.rem(number, jnp.int32(by)) if by & (by - 1) else number & (by - 1)


def following(place: Any, places: int) -> Any:
    """The place after one, of places that are taken in turn."""
    return jnp.where(place == places - 1, 0, place + 1)


def largest(scalars: Sequence[Any]) -> Any:
    """The largest of some scalars."""
    return reduce(jnp.maximum, scalars)


def if_then_else(condition: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Calls one of two functions."""
    pl.when(condition)(then)
    pl.when(jnp.logical_not(condition))(otherwise)
