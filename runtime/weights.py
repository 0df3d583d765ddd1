# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax's signatures are only partly typed)
"""Other weights in the place of a model's: the same tree, shapes and dtypes, on the same devices."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from ..model import Params


def placed_like(params: Any, current: Params) -> Params:
    """Weights copied to where the current ones lie.

    Always copied, also where they lie there already: whoever trains them may donate or delete the arrays.
    Old and new ones are in memory together until the engine lets go of the old.

    Args:
        params: what to copy, of jax's or NumPy's arrays.
        current: what it has to be like.

    Raises:
        TypeError: no tree, or a leaf is no array.
        ValueError: another structure, shape or dtype, or an array that was deleted; it names the first one.
        NotImplementedError: there are several processes, which would all need them.
    """
    if jax.process_count() > 1:
        raise NotImplementedError("params: other weights are not supported over several processes")
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
    copies = [
        jax.device_put(leaf, old.sharding, may_alias=False)
        for (_, leaf), (_, old) in zip(given, wanted, strict=True)
    ]
    jax.block_until_ready(copies)  # what fails, fails here
    return tree_unflatten(wanted_tree, copies)


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
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise ValueError(f"{name}: was deleted, or donated to a computation; pass the array that replaced it")
