# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Compiling for a TPU on a machine that need not have one: libtpu alone holds the compiler."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .chips import find_chip

UNREADABLE = "Error reading persistent compilation cache entry"  # as a warning of jax begins


def compile_for(
    chip: str, function: Callable[..., Any], *arguments: Any, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """Compiles a function for one core of a TPU.

    Args:
        chip: one of `CHIPS`.
        function: of arrays.
        arguments: pytrees of `jax.ShapeDtypeStruct`, or of arrays, whose shapes count alone.
        donate_argnums: as for `jax.jit`.

    Returns:
        The program; `as_text()` and `memory_analysis()` tell of it, and it cannot be called here.

    Raises:
        ValueError: an unknown chip.
        RuntimeError: libtpu is not installed.
        jax.errors.JaxRuntimeError: what the compiler refuses, in its own words.
    """
    lowered = trace_for(chip, function, *arguments, donate_argnums=donate_argnums).lower()
    with warnings.catch_warnings():
        # Without a device a program in the compilation cache cannot be loaded: jax says so, and compiles.
        warnings.filterwarnings("ignore", UNREADABLE, UserWarning)
        return lowered.compile()


def trace_for(
    chip: str, function: Callable[..., Any], *arguments: Any, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Traced:
    """Traces a function for one core of a TPU; parameters and errors are those of `compile_for`."""
    sharding = NamedSharding(_mesh(find_chip(chip).topology), PartitionSpec())

    def placed(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    with target(chip):
        jitted = jax.jit(function, out_shardings=sharding, donate_argnums=donate_argnums)
        return jitted.trace(*jax.tree.map(placed, arguments))


def target(chip: str) -> AbstractContextManager[object]:
    """Within it, kernels know that they are traced for a TPU.

    Raises:
        ValueError: an unknown chip.
        RuntimeError: libtpu is not installed.
    """
    return jax.set_mesh(_mesh(find_chip(chip).topology))


@cache
def _mesh(topology_name: str) -> Mesh:
    """A mesh of the first core of a topology. Raises as `topology_devices`."""
    return Mesh(np.array(topology_devices(topology_name)[:1]), ("x",))


@cache
def topology_devices(name: str, chips_per_host: tuple[int, ...] | None = None) -> tuple[Any, ...]:
    """The devices of a topology, none of which need be there.

    Args:
        name: as libtpu has it, "v6e:2x4".
        chips_per_host: along each dimension; None for what is usual.

    Raises:
        RuntimeError: libtpu is not installed.
    """
    if find_spec("libtpu") is None:
        raise RuntimeError("compiling for a TPU needs libtpu: pip install 'vsurge[tune]' (Linux on x86-64)")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the cloud's metadata server would be waited for
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several compilers, as no TPU is used
    options = {} if chips_per_host is None else {"chips_per_host_bounds": chips_per_host}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return tuple(cast("list[Any]", topology.devices))
