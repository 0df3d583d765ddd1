# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# (jaxprs are only partly typed)
"""The integers that reach the Pallas kernels inside a traced function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


@dataclass(frozen=True)
class KernelOperands:
    """What one `pallas_call` is given.

    Attributes:
        kernel: its name.
        operands: in order; None where they are no integers or depend on what is not given.
    """

    kernel: str
    operands: tuple[np.ndarray | None, ...]


def kernel_operands(traced: ClosedJaxpr, arguments: Sequence[np.ndarray | None]) -> list[KernelOperands]:
    """Computes all of a function that depends on given arguments alone, and notes what kernels are given.

    Args:
        traced: the function.
        arguments: its flattened arguments; None for those that are not given.
    """
    found = list[KernelOperands]()
    _run(traced.jaxpr, traced.consts, arguments, found)
    return found


def _run(
    jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], found: list[KernelOperands]
) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr")
        if equation.primitive.name == "pallas_call":
            integers = (
                None if value is None or np.asarray(value).dtype.kind != "i" else np.asarray(value)
                for value in given
            )
            found.append(KernelOperands(equation.params["name"], tuple(integers)))
            results = [None] * len(equation.outvars)
        elif isinstance(inner, ClosedJaxpr):
            results = _run(inner.jaxpr, inner.consts, given, found)
        elif any(value is None for value in given):
            results = [None] * len(equation.outvars)
        else:
            results = equation.primitive.bind(*given, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]
