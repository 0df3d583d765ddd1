"""A layer's experts (Qwen3-MoE): each token goes through a few of many MLPs, and through no other.

The pairs of a token and an expert that it takes are sorted by expert, so that each expert multiplies one run
of rows. On several devices each holds some of the experts (`PartitionAxis.expert_axis`), or a part of the
inner dimension of each (`mlp_intermediate_axis`), or both; it computes what its part adds to every token's
output, and the devices add up what they have. How many pairs a device will have is not known when a step is
compiled: there is room for all of them, those of other devices' experts come last, and nobody computes them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from .config import BFLOAT16, Experts, Qwen3Config
from .linear import in_all_reduce_dtype, linear, precision
from .params import LayerParams
from .quantization import QuantizedMatrix, untransposed
from .sharding import Layout

LEAST_TILE, MOST_TILE = 8, 64  # rows that one turn of `_by_tiles` takes
# Where XLA's kernel for `ragged_dot` multiplies bfloat16 with int8; elsewhere it first writes all experts'
# weights to memory in float32. As compiled by libtpu 0.0.42.1.
INT8_EXPERTS = ("v5e", "v5p", "v6e")

Tokens = Float[Array, "num_tokens hidden"]
Pairs = Int[Array, "num_tokens experts_per_token"]
PairWeights = Float[Array, "num_tokens experts_per_token"]
Rows = Float[Array, "num_pairs hidden"]
# Of all experts of a device; of quantized ones see `quantize_stack`.
Gates = Float[Array, "local_experts hidden inner"] | QuantizedMatrix
Downs = Float[Array, "local_experts inner hidden"] | QuantizedMatrix


def experts_mlp(
    layer: LayerParams, config: Qwen3Config, x: Tokens, *, layout: Layout | None = None
) -> Float[Array, "num_tokens hidden"]:
    """The sum of the MLPs of the experts that a token takes, each with the weight that its router gives it.

    Args:
        layer: one that has experts.
        config: the model's shape.
        x: the tokens.
        layout: what lies where on several devices; None for one.

    Returns:
        [num_tokens, hidden] in float32.

    Raises:
        ValueError: the layer or the configuration has no experts.
    """
    if config.experts is None or layer.router is None:
        raise ValueError("experts_mlp: the layer has no experts")
    arguments = (x, layer.router, layer.gate_proj, layer.up_proj, layer.down_proj)
    if layout is None or layout.mesh.size == 1:
        return _add_up(config, *arguments)
    expert_axes = layout.mesh_axes("experts")
    summed = expert_axes + layout.mesh_axes("mlp")

    def on_one_device(
        x: Array, router: Array, gate_proj: Gates, up_proj: Gates, down_proj: Downs
    ) -> Float[Array, "num_tokens hidden"]:
        first = lax.axis_index(expert_axes) * gate_proj.shape[0] if expert_axes else 0
        part = _add_up(config, x, router, gate_proj, up_proj, down_proj, first_expert=first)
        return in_all_reduce_dtype(config, partial(_sum_over, summed), part) if summed else part

    in_specs = (
        layout.spec("tokens", None),
        layout.spec(None, None),
        _specs(layout, layer.gate_proj, None, "mlp"),
        _specs(layout, layer.up_proj, None, "mlp"),
        _specs(layout, layer.down_proj, "mlp", None),
    )
    return layout.shard_map(on_one_device, in_specs, layout.spec("tokens", None))(*arguments)


def _specs(layout: Layout, weights: Any, in_axis: str | None, out_axis: str | None) -> Any:
    """How the matrices of all experts lie on the devices."""
    if not isinstance(weights, QuantizedMatrix):
        return layout.spec("experts", in_axis, out_axis)
    axes = (out_axis, in_axis) if weights.method == "nf4" else (in_axis, out_axis)
    scales = (out_axis,) if weights.method == "a8bit" else axes
    return replace(weights, data=layout.spec("experts", *axes), scales=layout.spec("experts", *scales))


def _sum_over(axes: tuple[str, ...], part: Tokens, dtype: np.dtype[Any]) -> Tokens:
    return lax.psum(part.astype(dtype), axes).astype(jnp.float32)


def _add_up(
    config: Qwen3Config,
    x: Tokens,
    router: Float[Array, "num_experts hidden"],
    gate_proj: Gates,
    up_proj: Gates,
    down_proj: Downs,
    *,
    first_expert: Int[Array, ""] | int = 0,
) -> Float[Array, "num_tokens hidden"]:
    """What the experts from `first_expert` on add to each token."""
    assert config.experts is not None
    weights, chosen = route(config, x, router)
    num_tokens, per_token = chosen.shape
    num_local = gate_proj.shape[0]
    local = chosen.reshape(-1) - first_expert
    local = jnp.where((local >= 0) & (local < num_local), local, num_local)
    order = jnp.argsort(local)
    group_sizes = jnp.sum(local[None] == jnp.arange(num_local, dtype=local.dtype)[:, None], axis=1)
    rows = x.astype(config.dtype)[order // per_token]
    outputs = grouped_mlp(
        config, rows, group_sizes.astype(jnp.int32), (gate_proj, up_proj, down_proj),
        tile=_tile(num_tokens * per_token, config.experts),
    )  # fmt: skip
    # Rows of other devices' experts may hold anything, NaN too: they are chosen away, not multiplied by zero.
    is_local = jnp.arange(order.size, dtype=jnp.int32) < jnp.sum(group_sizes)
    outputs = jnp.where(is_local[:, None], outputs, 0)[jnp.argsort(order)]
    return jnp.sum(outputs.reshape(num_tokens, per_token, -1) * weights[:, :, None], axis=1)


def route(
    config: Qwen3Config, x: Tokens, router: Float[Array, "num_experts hidden"]
) -> tuple[PairWeights, Pairs]:
    """The experts that each token takes, likeliest first, and their weights in float32.

    The weights are the softmax over all experts at those taken, divided by their sum if the model wants that.
    """
    assert config.experts is not None
    scores = jax.nn.softmax(linear(config, x, router), axis=-1)
    weights, chosen = lax.top_k(scores, config.experts.experts_per_token)
    if config.experts.normalize_weights:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


def grouped_mlp(
    config: Qwen3Config,
    rows: Rows,
    group_sizes: Int[Array, " local_experts"],
    weights: tuple[Gates, Gates, Downs],
    *,
    tile: int,
) -> Float[Array, "num_pairs hidden"]:
    """SwiGLU of each row by its expert.

    By `lax.ragged_dot` on a TPU, where XLA has a kernel for it that reads the weights of experts with rows
    and no others. Elsewhere XLA has every expert multiply every row, the rows of others set to zero: there
    it is a loop over tiles of rows; and on a TPU with weights that its kernel does not take as they are.

    Args:
        config: the model's shape.
        rows: sorted by expert, of the dtype to multiply in.
        group_sizes: how many rows each expert has; what follows these belongs to nobody.
        weights: gate_proj and up_proj [num_experts, hidden, inner], down_proj [num_experts, inner, hidden].
        tile: rows that are multiplied together in the loop.

    Returns:
        [num_pairs, hidden] in float32; what belongs to nobody may be anything.
    """
    gate_proj, up_proj, down_proj = (
        each if isinstance(each, QuantizedMatrix) else each.astype(rows.dtype) for each in weights
    )
    by_tiles = partial(_by_tiles, config, tile)
    has_kernel = all(_has_kernel(each, rows.dtype) for each in (gate_proj, up_proj, down_proj))
    by_kernel = partial(_by_ragged_dot, config) if has_kernel else by_tiles
    return lax.platform_dependent(
        rows, group_sizes, gate_proj, up_proj, down_proj, tpu=by_kernel, default=by_tiles
    )


def _has_kernel(weights: Any, dtype: np.dtype[Any]) -> bool:
    """Whether `ragged_dot` of a TPU reads such weights where they lie, if it is one that is traced for."""
    if not isinstance(weights, QuantizedMatrix):
        return True
    from jax.experimental.pallas import tpu as pltpu  # importing Pallas takes long

    if weights.method != "a8bit" or dtype != BFLOAT16 or not pltpu.is_tpu_device():
        return False
    return str(pltpu.get_tpu_info().chip_version) in INT8_EXPERTS


def _by_ragged_dot(
    config: Qwen3Config,
    rows: Array,
    group_sizes: Array,
    gate_proj: Gates,
    up_proj: Gates,
    down_proj: Downs,
) -> Array:
    ends = jnp.cumsum(group_sizes)
    expert = jnp.searchsorted(ends, jnp.arange(rows.shape[0], dtype=ends.dtype), side="right")

    def product(rows: Array, weights: Any) -> Array:
        numbers = weights.data if isinstance(weights, QuantizedMatrix) else weights
        found = lax.ragged_dot(
            rows, numbers, group_sizes, precision=precision(config), preferred_element_type=jnp.float32
        )
        if isinstance(weights, QuantizedMatrix):
            found *= weights.scales.at[expert].get(mode="clip")
        return found

    inner = jax.nn.silu(product(rows, gate_proj)) * product(rows, up_proj)
    return product(inner.astype(rows.dtype), down_proj)


def _by_tiles(
    config: Qwen3Config,
    tile: int,
    rows: Array,
    group_sizes: Array,
    gate_proj: Gates,
    up_proj: Gates,
    down_proj: Downs,
) -> Array:
    """A turn of the loop takes the next `tile` rows of one expert, or as many as it has left."""
    num_rows, hidden = rows.shape
    ends = jnp.cumsum(group_sizes)
    turns = jnp.cumsum(_turns(group_sizes, tile))  # up to and with each expert
    padded = jnp.concatenate([rows, jnp.zeros((tile, hidden), rows.dtype)])
    offsets = jnp.arange(tile, dtype=jnp.int32)

    def product(rows: Array, weights: Any) -> Array:
        if isinstance(weights, QuantizedMatrix):
            return linear(config, rows, untransposed(weights))
        return lax.dot(rows, weights, precision=precision(config), preferred_element_type=jnp.float32)

    def turn(i: Array, outputs: Array) -> Array:
        # XLA would convert all bfloat16 weights to float32 before the loop, for its slice has no bfloat16 on
        # a CPU; behind a barrier with something that changes in every turn, it converts what it slices.
        (weights, i) = lax.optimization_barrier(((gate_proj, up_proj, down_proj), i))
        expert = jnp.searchsorted(turns, i, side="right")
        size = group_sizes[expert]
        start = ends[expert] - size + (i - (turns[expert] - _turns(size, tile))) * tile
        gate, up, down = jax.tree.map(
            lambda each: lax.dynamic_index_in_dim(each, expert, keepdims=False), weights
        )
        mine = lax.dynamic_slice_in_dim(padded, start, tile)
        mine = jnp.where((start + offsets < ends[expert])[:, None], mine, 0)
        inner = jax.nn.silu(product(mine, gate)) * product(mine, up)
        # what lies beyond this expert's rows is written again by those whose rows they are
        return lax.dynamic_update_slice_in_dim(outputs, product(inner.astype(rows.dtype), down), start, 0)

    outputs = jnp.zeros((num_rows + tile, hidden), jnp.float32)
    return lax.fori_loop(0, turns[-1], turn, outputs)[:num_rows]


def _turns(sizes: Int[Array, ...], tile: int) -> Int[Array, ...]:
    return -(-sizes // tile)


def _tile(num_pairs: int, experts: Experts) -> int:
    """Enough for the rows that an expert has on average, in powers of two."""
    average = max(1, num_pairs // experts.num_experts)
    return min(MOST_TILE, max(LEAST_TILE, 2 ** math.ceil(math.log2(average))))
