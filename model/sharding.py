"""How weights, cache and activations lie on a mesh: one mapping from logical axes to axes of the mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..kernels import KVPages
from .config import Qwen3Config
from .safetensors_file import Part

AXIS_NAMES = ("dp", "fsdp", "ep", "tp", "sp")
TRIVIAL_DIMS = (1, 1, 1, 1, 1)
COPIES = "_copies"  # ends the name of the axis along which devices hold the same KV heads


@dataclass(frozen=True)
class PartitionAxis:
    """Which axis of the mesh each logical axis is split over; None for none.

    Attributes:
        vocab_axis: rows of the embedding and of the output matrix, logits, and what is remembered of tokens.
        head_axis: query heads.
        key_value_head_axis: key and value heads, in weights and in the cache; where it splits them, it must
            be the query heads' axis.
        mlp_intermediate_axis: the MLP's inner dimension.
        hidden_state_axis: the hidden dimension of weights.
        expert_axis: experts.
        sequence_axis: tokens of a step that has prompts.
        batch_axis: rows of the batch, and with them the pages of the cache.
    """

    vocab_axis: str | None = "tp"
    head_axis: str | None = "tp"
    key_value_head_axis: str | None = "tp"
    mlp_intermediate_axis: str | None = "tp"
    hidden_state_axis: str | None = "fsdp"
    expert_axis: str | None = "ep"
    sequence_axis: str | None = "sp"
    batch_axis: str | None = "dp"

    def mesh_axes(self) -> dict[str, str | None]:
        """The mapping, by the names that `params.TensorSpec.axes` and `kernels.KVPages.axes` use."""
        return {
            "vocab": self.vocab_axis,
            "q_heads": self.head_axis,
            "kv_heads": self.key_value_head_axis,
            "mlp": self.mlp_intermediate_axis,
            "hidden": self.hidden_state_axis,
            "experts": self.expert_axis,
            "router": None,
            "tokens": self.sequence_axis,
            "pages": self.batch_axis,
            "rows": self.batch_axis,
            "norm": None,
            "keys_values": None,
            "page_tokens": None,
            "head_dim": None,
        }


@dataclass(frozen=True)
class Layout:
    """A mesh, and what of a model lies where on it. Hashable: a static argument under jit.

    Build it with `layout_of`, which checks that a model can be split so. No device is touched: those of
    `jax.experimental.topologies` will do.

    Attributes:
        mesh: the devices. Where there are more of them along the KV heads' axis than KV heads, that axis is
            split in two, "tp" say in "tp", over which the KV heads are split, and "tp_copies", along which
            they are repeated; everything else is split over both.
        partition_axis: the mapping, in terms of the axes before that.
    """

    mesh: Mesh
    partition_axis: PartitionAxis

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The axes of the mesh that a logical axis is split over; none if it is not split."""
        name = self.partition_axis.mesh_axes()[axis]
        if name is None:
            return ()
        copies = name + COPIES
        if axis != "kv_heads" and copies in self.mesh.axis_names:
            return name, copies
        return (name,)

    def size(self, axis: str) -> int:
        """In how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[name] for name in self.mesh_axes(axis))

    def spec(self, *axes: str | None) -> PartitionSpec:
        """How an array with these logical axes is split; None is an axis that never is.

        Raises:
            ValueError: one axis of the mesh would split two dimensions of the array.
        """
        names = [() if axis is None else self.mesh_axes(axis) for axis in axes]
        used = [name for several in names for name in several]
        if len(set(used)) != len(used):
            raise ValueError(f"{self.partition_axis}: splits the dimensions {axes} of one array over {used}")
        return PartitionSpec(*[several[0] if len(several) == 1 else (several or None) for several in names])

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Where an array with these logical axes lies. Raises as `spec`."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def cache_sharding(self, kv_pages: KVPages) -> KVPages:
        """Where one layer's cache lies: a `KVPages` with a sharding in the place of each array."""
        return replace(kv_pages, **{name: self.sharding(*axes) for name, axes in kv_pages.axes.items()})

    def without(self, field: str) -> Layout:
        """The same, but that one of the mapping's fields ("sequence_axis", say) splits nothing."""
        return replace(self, partition_axis=replace(self.partition_axis, **{field: None}))

    def constrain(self, array: jax.Array, *axes: str | None) -> jax.Array:
        """The array, which the compiler is told to split so."""
        if self.mesh.size == 1:
            return array
        context = jax.sharding.get_abstract_mesh()  # within a shard_map over some axes, that of the others
        mesh = self.mesh if context.empty else context
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, self.spec(*axes)))

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` run by each device on its part of the arguments, over all axes not yet taken so.

        What an output's spec leaves out must be the same on all devices; that is not checked.
        """
        if self.mesh.size == 1:
            return function
        context = jax.sharding.get_abstract_mesh()
        options: dict[str, Any] = {"in_specs": in_specs, "out_specs": out_specs, "check_vma": False}
        if context.empty:
            return jax.shard_map(function, mesh=self.mesh, **options)
        types = zip(context.axis_names, context.axis_types, strict=True)
        return jax.shard_map(
            function, axis_names={name for name, kind in types if kind != AxisType.Manual}, **options
        )


def layout_of(config: Qwen3Config, mesh: Mesh, partition_axis: PartitionAxis) -> Layout:
    """How a model lies on a mesh.

    Raises:
        ValueError: the mapping names an axis that the mesh does not have, or a dimension of the model cannot
            be split into so many equal parts.
    """
    for field in fields(partition_axis):
        name = getattr(partition_axis, field.name)
        if name is not None and name not in mesh.axis_names:
            raise ValueError(f"{field.name}={name!r}: the mesh has the axes {mesh.axis_names}")

    def size(axis: str | None) -> int:
        return 1 if axis is None else mesh.shape[axis]

    for what, number, field in (
        ("vocab_size", config.vocab_size, "vocab_axis"),
        ("num_q_heads", config.num_q_heads, "head_axis"),
        ("intermediate_size", config.intermediate_size, "mlp_intermediate_axis"),
        ("hidden_size", config.hidden_size, "hidden_state_axis"),
    ):
        name = getattr(partition_axis, field)
        if number % size(name):
            raise ValueError(
                f"{what}={number}: cannot be split evenly over {size(name)} devices ({field}={name!r})"
            )
    if config.experts is not None:
        for what, number, field in (
            ("num_experts", config.experts.num_experts, "expert_axis"),
            ("intermediate_size of experts", config.experts.intermediate_size, "mlp_intermediate_axis"),
        ):
            name = getattr(partition_axis, field)
            if number % size(name):
                raise ValueError(
                    f"{what}={number}: cannot be split evenly over {size(name)} devices ({field}={name!r})"
                )
    heads, q_axis = partition_axis.key_value_head_axis, partition_axis.head_axis
    if heads != q_axis and max(size(heads), size(q_axis)) > 1:
        raise ValueError(
            f"key_value_head_axis={heads!r}, head_axis={q_axis!r}: must be the same axis, for query heads "
            f"read the KV heads on their own device; {heads!r} has {size(heads)} devices, {q_axis!r} has "
            f"{size(q_axis)}"
        )
    parts = math.gcd(config.num_kv_heads, size(heads))
    if config.num_kv_heads % size(heads) == 0 or heads is None:
        return Layout(mesh, partition_axis)
    if parts != config.num_kv_heads:
        raise ValueError(
            f"num_kv_heads={config.num_kv_heads}: must be a multiple of the {size(heads)} devices along "
            f"key_value_head_axis={heads!r}, or divide them"
        )
    return Layout(_with_copies(mesh, heads, parts), partition_axis)


def _with_copies(mesh: Mesh, axis: str, parts: int) -> Mesh:
    """The mesh with an axis split in two: `parts`, and those that have the same part, next to each other."""
    place = mesh.axis_names.index(axis)
    shape, names = list(mesh.devices.shape), list(mesh.axis_names)
    shape[place : place + 1] = parts, shape[place] // parts
    names[place : place + 1] = axis, axis + COPIES
    return Mesh(mesh.devices.reshape(shape), tuple(names))


def device_parts(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[Part, list[Any]]:
    """The different parts of an array that this process's devices hold, and which devices hold each."""
    devices: dict[Part, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        part = tuple((one.indices(n)[0], one.indices(n)[1]) for one, n in zip(index, shape, strict=True))
        devices.setdefault(part, []).append(device)
    return devices


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
        TypeError: the dimensions are no integers, or the names no strings.
    """
    dims = _listed("sharding_axis_dims", sharding_axis_dims, Integral, "integers")
    names = _listed("axis_names", axis_names, str, "strings")
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
    return Mesh(np.array(available[: math.prod(dims)]).reshape(dims), names)


def _listed(name: str, values: Any, kind: type, what: str) -> tuple[Any, ...]:
    listed = isinstance(values, Iterable) and not isinstance(values, str)
    if not listed or not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
        raise TypeError(f"{name}={values!r}: must be a sequence of {what}")
    return tuple(values)
