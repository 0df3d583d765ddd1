# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""How a Triton kernel is run: compiled on a GPU, interpreted elsewhere, decided when a program is lowered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def call(
    kernel: Callable[..., None],
    arguments: Sequence[Any],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    *,
    name: str,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    input_output_aliases: Mapping[int, int] | None = None,
) -> tuple[jax.Array, ...]:
    """Runs `kernel(*arguments, *outputs)` of references to whole arrays, a program per entry of the grid."""

    def run(*arguments: Any, interpret: bool) -> tuple[jax.Array, ...]:
        return tuple(
            pl.pallas_call(
                kernel,
                out_shape=tuple(out_shape),
                grid=grid,
                name=name,
                interpret=interpret,
                input_output_aliases=dict(input_output_aliases or {}),
                compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
            )(*arguments)
        )

    def compiled(*arguments: Any) -> tuple[jax.Array, ...]:
        return run(*arguments, interpret=False)

    def interpreted(*arguments: Any) -> tuple[jax.Array, ...]:
        return run(*arguments, interpret=True)

    return cast(
        "tuple[jax.Array, ...]", lax.platform_dependent(*arguments, cuda=compiled, default=interpreted)
    )
