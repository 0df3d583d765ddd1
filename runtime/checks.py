"""Parameters as callers write them, in NumPy's numbers too, as Python's own; or an error that names them."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any, cast

import numpy as np

# Positive ones, of those that the device keeps numbers in.
SMALLEST_FLOAT32, LARGEST_FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def is_integer(value: Any) -> bool:
    """Whether it is a Python or NumPy integer; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def as_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A parameter as an int.

    Args:
        name: the parameter.
        value: what the caller gave.
        low, high: the range, both ends in it; None for no upper end.

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    if not is_integer(value):
        raise TypeError(f"{name}={value!r}: must be an integer")
    number = operator.index(value)
    if number < low or (high is not None and number > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name}={number}: must be {allowed}")
    return number


def as_optional_integer(name: str, value: Any, low: int, high: int | None = None) -> int | None:
    """`as_integer`, but None stays None."""
    if value is None:
        return None
    if not is_integer(value):
        raise TypeError(f"{name}={value!r}: must be an integer or None")
    return as_integer(name, value, low, high)


def as_number(name: str, value: Any, low: float | int, high: float | int, *, low_open: bool = False) -> float:
    """A parameter as a finite float.

    Args:
        name: the parameter.
        value: what the caller gave.
        low, high: the range.
        low_open: whether `low` itself is out of it.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r}: must be a number")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the floats
        number = math.inf
    in_range = (low < number if low_open else low <= number) and number <= high and math.isfinite(number)
    if not in_range:
        bracket = "(" if low_open else "["
        end = "infinity)" if high == math.inf else f"{high}]"
        raise ValueError(f"{name}={value}: must lie in {bracket}{low}, {end}")
    return number


def as_flag(name: str, value: Any) -> bool:
    """A parameter as a bool.

    Raises:
        TypeError: not a bool.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value!r}: must be True or False")
    return bool(cast("bool", value))


def as_integers(name: str, values: Any, low: int) -> tuple[int, ...]:
    """A parameter that is several integers.

    Raises:
        TypeError: not a sequence, or an element is not an integer.
        ValueError: an element below `low`.
    """
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Iterable):
        raise TypeError(f"{name}={values!r}: must be a sequence of integers")
    return tuple(as_integer(f"{name}[{i}]", value, low) for i, value in enumerate(values))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def check_vocabulary(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Refuses token ids that a model does not have.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{name}: token id {token_id} is outside the vocabulary, 0 to {vocab_size - 1}")
