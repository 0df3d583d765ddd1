"""Qwen3 as pure functions over a pytree of arrays.

A forward pass takes the new tokens of any number of sequences, concatenated, writes their keys and values
into the paged cache and returns the logits of the rows that need them. Matrix products take operands of
`config.dtype` and give float32; norms, softmax, rotary embedding and the residual stream are float32.

On many devices a `Layout` says what lies where. The compiler splits the products as the weights are split and
adds up what `o_proj` and `down_proj` give, in `config.all_reduce_dtype`; the attention kernels, which it
cannot split, are run by each device on its own heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ..kernels import KVPages, append_kv, paged_decode_attention, ragged_paged_attention
from .config import Qwen3Config
from .linear import broadcast, linear
from .moe import experts_mlp
from .params import LayerParams, Params
from .quantization import QuantizedMatrix
from .rope import rotary_tables, rotate
from .sharding import Layout

if TYPE_CHECKING:
    Leaf = jax.Array
else:  # a leaf may also be a ShapeDtypeStruct
    Leaf = Any

Heads = Float[Array, "num_tokens num_heads head_dim"]
Queries = Float[Array, "num_tokens num_q_heads head_dim"]
KeyValues = Float[Array, "num_tokens num_kv_heads head_dim"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One step's work: the new tokens of all sequences, and where their cache lies. All int32.

    Attributes:
        token_ids: [num_tokens], the sequences' new tokens one after the other; padding is any valid id.
        positions: [num_tokens], each token's position in its sequence.
        slots: [num_tokens], where its keys and values go, `page * page_size + offset`; -1 for padding.
        kv_lens: [max_seqs], tokens in the cache after this step; 0 for padding rows.
        page_table: [max_seqs, pages_per_seq].
        query_starts: [max_seqs + 1], sequence i owns tokens query_starts[i] to query_starts[i + 1]. None in a
            decode step: every sequence has one token, num_tokens = max_seqs.
        num_seqs: [1], sequences in use; None in a decode step.
        logit_rows: [num_logit_rows], the tokens whose logits are wanted; None for all of them.
    """

    token_ids: Leaf
    positions: Leaf
    slots: Leaf
    kv_lens: Leaf
    page_table: Leaf
    query_starts: Leaf | None = None
    num_seqs: Leaf | None = None
    logit_rows: Leaf | None = None


def forward(
    params: Params,
    config: Qwen3Config,
    batch: Batch,
    kv_pages: tuple[KVPages, ...],
    *,
    layout: Layout | None = None,
) -> tuple[Float[Array, "num_logit_rows vocab"], tuple[KVPages, ...]]:
    """One pass over the new tokens of a batch.

    Args:
        params: the weights.
        config: the model's shape (static under jit).
        batch: the new tokens and their place in the cache.
        kv_pages: one cache per layer; donate them under jit, or each is copied.
        layout: what lies where on several devices (static under jit); None for one.

    Returns:
        logits [num_logit_rows, vocab] in float32, and the caches with the new tokens' keys and values.

    Raises:
        ValueError: the number of caches is not the number of layers, or the tokens cannot be split evenly.
    """
    x, kv_pages = hidden_states(params, config, batch, kv_pages, layout=layout)
    if batch.logit_rows is not None:
        x = x[batch.logit_rows]
    return logits(params, config, x, layout=layout), kv_pages


def hidden_states(
    params: Params,
    config: Qwen3Config,
    batch: Batch,
    kv_pages: tuple[KVPages, ...],
    *,
    layout: Layout | None = None,
) -> tuple[Float[Array, "num_tokens hidden"], tuple[KVPages, ...]]:
    """`forward` without its last product: what `logits` takes, of all tokens."""
    if len(kv_pages) != config.num_layers:
        raise ValueError(f"kv_pages: {len(kv_pages)} caches for {config.num_layers} layers")
    if layout is not None:
        layout = _layout_of_step(layout, batch)
    written = list(kv_pages)

    def attend(layer: int, queries: Queries, keys: KeyValues, values: KeyValues) -> Queries:
        output, written[layer] = paged_attention(
            config, batch, queries, (keys, values), written[layer], layout=layout
        )
        return output

    x = decoder(params, config, batch.token_ids, batch.positions, attend, layout=layout)
    return x, tuple(written)


def _layout_of_step(layout: Layout, batch: Batch) -> Layout:
    """With a token per sequence there is nothing to gain from splitting them: every device has to read the
    weights anyway."""
    if batch.query_starts is None:
        return layout.without("sequence_axis")
    num_tokens, parts = batch.token_ids.shape[0], layout.size("tokens")
    if num_tokens % parts:
        raise ValueError(
            f"token_ids: {num_tokens} cannot be split evenly over {parts} devices "
            f"(sequence_axis={layout.partition_axis.sequence_axis!r})"
        )
    return layout


def decoder(
    params: Params,
    config: Qwen3Config,
    token_ids: Int[Array, " num_tokens"],
    positions: Int[Array, " num_tokens"],
    attend: Callable[[int, Queries, KeyValues, KeyValues], Queries],
    *,
    layout: Layout | None = None,
) -> Float[Array, "num_tokens hidden"]:
    """Embedding and all decoder layers; `attend(layer, queries, keys, values)` is the attention."""
    x = params.embedding.at[token_ids].get(mode="clip").astype(jnp.float32)
    x = _constrain(layout, x, "tokens", None)
    tables = rotary_tables(config, positions)
    for index, layer in enumerate(params.layers):
        attended = attend(index, *before_attention(layer, config, tables, x, layout=layout))
        x = after_attention(layer, config, x, attended, layout=layout)
    return x


# The halves of a layer are jitted so that they are traced once and not once per layer; XLA inlines them.
@partial(jax.jit, static_argnames=("config", "layout"))
def before_attention(
    layer: LayerParams,
    config: Qwen3Config,
    tables: tuple[Array, Array],
    x: Float[Array, "num_tokens hidden"],
    *,
    layout: Layout | None = None,
) -> tuple[Queries, KeyValues, KeyValues]:
    """A layer's queries, keys and values."""
    normed = rms_norm(x, layer.input_norm, config.rms_norm_eps)
    queries, keys, values = project_heads(layer, config, tables, normed)
    return (
        _constrain(layout, queries, "tokens", "q_heads", None),
        _constrain(layout, keys, "tokens", "kv_heads", None),
        _constrain(layout, values, "tokens", "kv_heads", None),
    )


@partial(jax.jit, static_argnames=("config", "layout"))
def after_attention(
    layer: LayerParams,
    config: Qwen3Config,
    x: Float[Array, "num_tokens hidden"],
    attended: Queries,
    *,
    layout: Layout | None = None,
) -> Float[Array, "num_tokens hidden"]:
    """A layer's output, from its input and its attention."""
    attended = attended.reshape(x.shape[0], -1)
    x = x + linear(config, attended, layer.o_proj, layer.o_bias, over_devices=_is_split(layout, "q_heads"))
    x = _constrain(layout, x, "tokens", None)
    x = x + mlp(layer, config, rms_norm(x, layer.post_attention_norm, config.rms_norm_eps), layout=layout)
    return _constrain(layout, x, "tokens", None)


def logits(
    params: Params, config: Qwen3Config, x: Float[Array, "rows hidden"], *, layout: Layout | None = None
) -> Float[Array, "rows vocab"]:
    """Scores of every token of the vocabulary, from the decoder's output."""
    head = params.embedding if params.lm_head is None else params.lm_head
    x = _constrain(layout, x, None, None)
    scores = linear(config, rms_norm(x, params.final_norm, config.rms_norm_eps), head)
    return _constrain(layout, scores, None, "vocab")


def _is_split(layout: Layout | None, axis: str) -> bool:
    return layout is not None and layout.size(axis) > 1


def _constrain(layout: Layout | None, array: Array, *axes: str | None) -> Array:
    return array if layout is None else layout.constrain(array, *axes)


def project_heads(
    layer: LayerParams,
    config: Qwen3Config,
    tables: tuple[Array, Array],
    x: Float[Array, "num_tokens hidden"],
) -> tuple[Queries, KeyValues, KeyValues]:
    """Queries, keys and values of `config.dtype`; queries and keys are normed per head, then rotated."""

    def heads(weight: Array | QuantizedMatrix, bias: Array | None, num_heads: int) -> Heads:
        return linear(config, x, weight, bias).reshape(-1, num_heads, config.head_dim)

    queries = heads(layer.q_proj, layer.q_bias, config.num_q_heads)
    keys = heads(layer.k_proj, layer.k_bias, config.num_kv_heads)
    values = heads(layer.v_proj, layer.v_bias, config.num_kv_heads)
    queries = rotate(rms_norm(queries, layer.q_norm, config.rms_norm_eps), tables)
    keys = rotate(rms_norm(keys, layer.k_norm, config.rms_norm_eps), tables)
    return queries.astype(config.dtype), keys.astype(config.dtype), values.astype(config.dtype)


def paged_attention(
    config: Qwen3Config,
    batch: Batch,
    queries: Queries,
    new_kv: tuple[KeyValues, KeyValues],
    kv_pages: KVPages,
    *,
    layout: Layout | None = None,
) -> tuple[Queries, KVPages]:
    """Attention, and the cache with the new tokens' keys and values.

    By the decode kernel in a step of one token per sequence, by the ragged one in any other; the config names
    the implementation of each. On several devices each has its own heads, and its own of the step's tokens to
    attend from; all of them write all tokens.
    """
    if layout is None:
        return _attend(config, batch, queries, new_kv, kv_pages)
    of_queries = layout.spec("tokens", "q_heads", None)
    of_new = layout.spec(None, "kv_heads", None)
    # In the step of one replica, which has pages of its own: within it they are not split.
    pages = layout.without("batch_axis")
    of_cache = replace(kv_pages, **{name: pages.spec(*axes) for name, axes in kv_pages.axes.items()})

    def attend(
        batch: Batch, queries: Array, new_kv: tuple[Array, Array], kv_pages: KVPages
    ) -> tuple[Array, KVPages]:
        if layout.size("tokens") == 1:
            return _attend(config, batch, queries, new_kv, kv_pages)
        assert batch.query_starts is not None
        kv_pages = append_kv(kv_pages, *new_kv, batch.slots, implementation=config.attention)
        start = jax.lax.axis_index(layout.mesh_axes("tokens")) * queries.shape[0]
        return _attend(config, _slice_of(batch, start, queries.shape[0]), queries, None, kv_pages)

    everywhere = jax.tree.map(lambda _: PartitionSpec(), batch)
    mapped = layout.shard_map(
        attend, (everywhere, of_queries, (of_new, of_new), of_cache), (of_queries, of_cache)
    )
    return mapped(batch, queries, new_kv, kv_pages)


def _slice_of(batch: Batch, start: Array, size: int) -> Batch:
    """A batch whose queries are `size` of another one's tokens, from `start` on; they see what they saw."""
    assert batch.query_starts is not None
    starts = batch.query_starts
    behind = starts[1:] - jnp.maximum(starts[:-1], start + size)  # a sequence's tokens after these
    return replace(
        batch,
        query_starts=jnp.clip(starts - start, 0, size),
        kv_lens=batch.kv_lens - jnp.maximum(behind, 0),
    )


def _attend(
    config: Qwen3Config,
    batch: Batch,
    queries: Queries,
    new_kv: tuple[KeyValues, KeyValues] | None,
    kv_pages: KVPages,
) -> tuple[Queries, KVPages]:
    """`paged_attention` of one device; without `new_kv` the cache has the new tokens already."""
    options: dict[str, Any] = {"scale": config.head_dim**-0.5}
    if new_kv is not None:
        options |= {"new_kv": new_kv, "slots": batch.slots}
    attended: Any
    if batch.query_starts is None or batch.num_seqs is None:
        attended = paged_decode_attention(
            queries,
            kv_pages,
            batch.kv_lens,
            batch.page_table,
            implementation=config.decode_attention,
            **options,
        )
    else:
        attended = ragged_paged_attention(
            queries,
            kv_pages,
            batch.kv_lens,
            batch.page_table,
            batch.query_starts,
            batch.num_seqs,
            implementation=config.attention,
            **options,
        )
    return attended if new_kv is not None else (attended, kv_pages)


def mlp(
    layer: LayerParams,
    config: Qwen3Config,
    x: Float[Array, "num_tokens hidden"],
    *,
    layout: Layout | None = None,
) -> Float[Array, "num_tokens hidden"]:
    """SwiGLU (arXiv 2002.05202), by one MLP or by the experts that each token takes."""
    if layer.router is not None:
        return experts_mlp(layer, config, x, layout=layout)
    gate = jax.nn.silu(linear(config, x, layer.gate_proj))
    inner = _constrain(layout, gate * linear(config, x, layer.up_proj), "tokens", "mlp")
    return linear(config, inner, layer.down_proj, over_devices=_is_split(layout, "mlp"))


def rms_norm(
    x: Float[Array, "*rows dim"], weight: Float[Array, " dim"], eps: float
) -> Float[Array, "*rows dim"]:
    """x scaled to root mean square 1 over its last axis, times the weight; float32 (arXiv 1910.07467)."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps) * broadcast(weight.astype(jnp.float32), x.ndim)
