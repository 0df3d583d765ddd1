# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax's signatures are only partly typed)
"""Other weights in the place of a model's: the same tree, shapes and dtypes, on the same devices."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Sharding
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from ..model import Params

Parts = dict[int, npt.NDArray[Any]]  # what lies on each device of a process, by its id


def placed_like(params: Any, current: Params) -> Params:
    """Weights copied to where the current ones lie, on devices of this process.

    Always copied, also where they lie there already: whoever trains them may donate or delete the arrays.
    Old and new ones are in memory together until the engine lets go of the old.

    Args:
        params: what to copy, of jax's or NumPy's arrays.
        current: what it has to be like.

    Raises:
        TypeError, ValueError: as `checked_leaves`.
    """
    leaves = checked_leaves(params, current)
    structure: Any = jax.tree.structure(current)
    copies = [
        jax.device_put(leaf, old.sharding, may_alias=False)
        for leaf, old in zip(leaves, jax.tree.leaves(current), strict=True)
    ]
    jax.block_until_ready(copies)  # what fails, fails here
    return tree_unflatten(structure, copies)


def checked_leaves(params: Any, current: Params) -> list[Any]:
    """The arrays of weights that may take the current ones' place.

    Raises:
        TypeError: no tree, or a leaf is no array.
        ValueError: another structure, shape or dtype, or an array that was deleted, or that cannot be read in
            this process; it names the first one.
    """
    given, given_tree = _flattened(params)
    wanted, wanted_tree = _flattened(current)
    if given and not given[0][0]:
        raise TypeError(f"params: is a {type(params).__name__}, must be a Params like model.params")
    for (path, leaf), (wanted_path, wanted_leaf) in zip(given, wanted, strict=False):
        if path != wanted_path:
            raise ValueError(
                f"params: has {keystr(path)} where the engine's weights have {keystr(wanted_path)}"
            )
        _check_leaf("params" + keystr(path), leaf, wanted_leaf)
    if len(given) != len(wanted):
        path = (given if len(given) > len(wanted) else wanted)[min(len(given), len(wanted))][0]
        what = "has" if len(given) > len(wanted) else "lacks"
        raise ValueError(
            f"params: {what} {keystr(path)}; {len(given)} arrays, the engine's weights are {len(wanted)}"
        )
    if given_tree != wanted_tree:
        raise ValueError(f"params: the tree is {given_tree}, the engine's weights are {wanted_tree}")
    return [leaf for _, leaf in given]


def on_host(leaf: Any) -> npt.NDArray[Any]:
    """An array's content in this process's memory, and nowhere but in what is returned.

    Args:
        leaf: of jax's or NumPy's, one that `checked_leaves` has let pass.
    """
    if isinstance(leaf, np.ndarray):
        return np.asarray(cast("Any", leaf))  # without what subclasses add
    here: jax.Array = leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
    # An array keeps what was read of it for as long as it lives; a copy does not live long.
    return np.asarray(jax.device_put(here, here.sharding, may_alias=False))


def parts_of(array: npt.NDArray[Any], sharding: Sharding) -> dict[int, Parts]:
    """What each process holds of an array; devices with the same part have the same object."""
    parts: dict[int, Parts] = {}
    distinct: dict[str, npt.NDArray[Any]] = {}
    indices: Any = sharding.devices_indices_map(array.shape)
    for device, index in indices.items():
        part = distinct.setdefault(str(index), np.asarray(array[index]))
        parts.setdefault(device.process_index, {})[device.id] = part
    return parts


def assembled(parts: Parts, like: jax.Array) -> jax.Array:
    """The array whose parts these are, copied to this process's devices; of the others it has theirs."""
    devices: Any = like.sharding.addressable_devices_indices_map(like.shape)
    copies = [jax.device_put(parts[device.id], device, may_alias=False) for device in devices]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, copies)


def _flattened(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """The leaves with their paths, and the structure."""
    return cast("Any", tree_flatten_with_path(tree))


def _check_leaf(name: str, leaf: Any, wanted: jax.Array) -> None:
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise TypeError(f"{name}: is a {type(leaf).__name__}, must be an array")
    if leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
        raise ValueError(
            f"{name}: is {leaf.dtype}{list(leaf.shape)}, must be {wanted.dtype}{list(wanted.shape)}"  # pyright: ignore[reportUnknownArgumentType]
        )
    if not isinstance(leaf, jax.Array):
        return
    if leaf.is_deleted():
        raise ValueError(f"{name}: was deleted, or donated to a computation; pass the array that replaced it")
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise ValueError(
            f"{name}: other processes hold parts of it; gather it in process 0, with "
            "jax.experimental.multihost_utils.process_allgather for one"
        )
