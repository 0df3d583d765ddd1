"""How weights and cache lie on a mesh of devices: one mapping from logical axes to axes of the mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..kernels import KVPages

AXIS_NAMES = ("dp", "fsdp", "ep", "tp", "sp")
TRIVIAL_DIMS = (1, 1, 1, 1, 1)


@dataclass(frozen=True)
class PartitionAxis:
    """Which axis of the mesh each logical axis is split over; None for none.

    Attributes:
        vocab_axis: rows of the embedding and of the output matrix.
        head_axis: query heads.
        key_value_head_axis: key and value heads, in weights and in the cache.
        mlp_intermediate_axis: the MLP's inner dimension.
        hidden_state_axis: the hidden dimension of weights.
    """

    vocab_axis: str | None = "tp"
    head_axis: str | None = "tp"
    key_value_head_axis: str | None = "tp"
    mlp_intermediate_axis: str | None = "tp"
    hidden_state_axis: str | None = "fsdp"

    def mesh_axes(self) -> dict[str, str | None]:
        """The mapping, by the names that `params.TensorSpec.axes` and `kernels.KVPages.axes` use."""
        return {
            "vocab": self.vocab_axis,
            "q_heads": self.head_axis,
            "kv_heads": self.key_value_head_axis,
            "mlp": self.mlp_intermediate_axis,
            "hidden": self.hidden_state_axis,
            "norm": None,
            "pages": None,
            "keys_values": None,
            "page_tokens": None,
            "head_dim": None,
        }


def make_mesh(
    sharding_axis_dims: Sequence[int] = TRIVIAL_DIMS,
    axis_names: Sequence[str] = AXIS_NAMES,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of the given shape.

    Args:
        sharding_axis_dims: devices along (dp, fsdp, ep, tp, sp); one of them may be -1 for all that remain.
        axis_names: other names for the five axes.
        devices: the jax devices to use; None for all of them if a -1 asks for it, else as many as needed.

    Raises:
        ValueError: the dimensions or names are malformed, or there are not that many devices.
        NotImplementedError: more than one device; this version computes on one.
    """
    dims, names = tuple(sharding_axis_dims), tuple(axis_names)
    if len(dims) != len(AXIS_NAMES):
        raise ValueError(f"sharding_axis_dims={dims}: must have {len(AXIS_NAMES)} entries, {AXIS_NAMES}")
    if len(names) != len(AXIS_NAMES) or len(set(names)) != len(names):
        raise ValueError(f"axis_names={names}: must be {len(AXIS_NAMES)} different names")
    if dims.count(-1) > 1 or any(d < 1 and d != -1 for d in dims):
        raise ValueError(f"sharding_axis_dims={dims}: entries are at least 1, and at most one is -1")
    available = list(jax.devices() if devices is None else devices)
    given = math.prod(d for d in dims if d != -1)
    if -1 in dims:
        if len(available) % given:
            raise ValueError(
                f"sharding_axis_dims={dims}: {len(available)} devices are no multiple of {given}"
            )
        dims = tuple(len(available) // given if d == -1 else d for d in dims)
    elif given > len(available):
        raise ValueError(f"sharding_axis_dims={dims}: needs {given} devices, there are {len(available)}")
    for name, dim in zip(names, dims, strict=True):
        if dim > 1:
            raise NotImplementedError(
                f"sharding_axis_dims={dims}: {dim} devices along {name!r}; more than one device is not "
                f"supported yet, use {TRIVIAL_DIMS} (a -1 takes all {len(available)} devices of this machine)"
            )
    return Mesh(np.array(available[: math.prod(dims)]).reshape(dims), names)


def named_sharding(mesh: Mesh, axes: Sequence[str], partition_axis: PartitionAxis) -> NamedSharding:
    """Where an array with these logical axes lies.

    Raises:
        ValueError: `partition_axis` names an axis that the mesh does not have, or one axis for two
            dimensions of the same array.
    """
    for field in fields(partition_axis):
        name = getattr(partition_axis, field.name)
        if name is not None and name not in mesh.axis_names:
            raise ValueError(f"{field.name}={name!r}: the mesh has the axes {mesh.axis_names}")
    mapping = partition_axis.mesh_axes()
    mesh_axes = [mapping[axis] for axis in axes]
    used = [axis for axis in mesh_axes if axis is not None]
    if len(set(used)) != len(used):
        raise ValueError(f"{partition_axis}: splits the dimensions {tuple(axes)} of one array over {used}")
    return NamedSharding(mesh, PartitionSpec(*mesh_axes))


def cache_sharding(mesh: Mesh, kv_pages: KVPages, partition_axis: PartitionAxis) -> KVPages:
    """Where one layer's cache lies: a `KVPages` with a sharding in the place of each array.

    Raises:
        ValueError: as `named_sharding`.
    """
    shardings = {name: named_sharding(mesh, axes, partition_axis) for name, axes in kv_pages.axes.items()}
    return replace(kv_pages, **shardings)
