"""Qwen3 as pure functions over a pytree of arrays.

A forward pass takes the new tokens of any number of sequences, concatenated, writes their keys and values
into the paged cache and returns the logits of the rows that need them. Matrix products take operands of
`config.dtype` and give float32; norms, softmax, rotary embedding and the residual stream are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..kernels import KVPages, paged_decode_attention, ragged_paged_attention
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
    params: Params, config: Qwen3Config, batch: Batch, kv_pages: tuple[KVPages, ...]
) -> tuple[Float[Array, "num_logit_rows vocab"], tuple[KVPages, ...]]:
    """One pass over the new tokens of a batch.

    Args:
        params: the weights.
        config: the model's shape (static under jit).
        batch: the new tokens and their place in the cache.
        kv_pages: one cache per layer; donate them under jit, or each is copied.

    Returns:
        logits [num_logit_rows, vocab] in float32, and the caches with the new tokens' keys and values.

    Raises:
        ValueError: the number of caches is not the number of layers.
    """
    x, kv_pages = hidden_states(params, config, batch, kv_pages)
    if batch.logit_rows is not None:
        x = x[batch.logit_rows]
    return logits(params, config, x), kv_pages


def hidden_states(
    params: Params, config: Qwen3Config, batch: Batch, kv_pages: tuple[KVPages, ...]
) -> tuple[Float[Array, "num_tokens hidden"], tuple[KVPages, ...]]:
    """`forward` without its last product: what `logits` takes, of all tokens."""
    if len(kv_pages) != config.num_layers:
        raise ValueError(f"kv_pages: {len(kv_pages)} caches for {config.num_layers} layers")
    written = list(kv_pages)

    def attend(layer: int, queries: Queries, keys: KeyValues, values: KeyValues) -> Queries:
        output, written[layer] = paged_attention(config, batch, queries, (keys, values), written[layer])
        return output

    return decoder(params, config, batch.token_ids, batch.positions, attend), tuple(written)


def decoder(
    params: Params,
    config: Qwen3Config,
    token_ids: Int[Array, " num_tokens"],
    positions: Int[Array, " num_tokens"],
    attend: Callable[[int, Queries, KeyValues, KeyValues], Queries],
) -> Float[Array, "num_tokens hidden"]:
    """Embedding and all decoder layers; `attend(layer, queries, keys, values)` is the attention."""
    x = params.embedding.at[token_ids].get(mode="clip").astype(jnp.float32)
    tables = rotary_tables(config, positions)
    for index, layer in enumerate(params.layers):
        attended = attend(index, *before_attention(layer, config, tables, x))
        x = after_attention(layer, config, x, attended)
    return x


# The halves of a layer are jitted so that they are traced once and not once per layer; XLA inlines them.
@partial(jax.jit, static_argnames="config")
def before_attention(
    layer: LayerParams,
    config: Qwen3Config,
    tables: tuple[Array, Array],
    x: Float[Array, "num_tokens hidden"],
) -> tuple[Queries, KeyValues, KeyValues]:
    """A layer's queries, keys and values."""
    return project_heads(layer, config, tables, rms_norm(x, layer.input_norm, config.rms_norm_eps))


@partial(jax.jit, static_argnames="config")
def after_attention(
    layer: LayerParams, config: Qwen3Config, x: Float[Array, "num_tokens hidden"], attended: Queries
) -> Float[Array, "num_tokens hidden"]:
    """A layer's output, from its input and its attention."""
    x = x + linear(config, attended.reshape(x.shape[0], -1), layer.o_proj, layer.o_bias)
    return x + mlp(layer, config, rms_norm(x, layer.post_attention_norm, config.rms_norm_eps))


def logits(params: Params, config: Qwen3Config, x: Float[Array, "rows hidden"]) -> Float[Array, "rows vocab"]:
    """Scores of every token of the vocabulary, from the decoder's output."""
    head = params.embedding if params.lm_head is None else params.lm_head
    return linear(config, rms_norm(x, params.final_norm, config.rms_norm_eps), head)


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
) -> tuple[Queries, KVPages]:
    """Attention, and the cache with the new tokens' keys and values.

    By the decode kernel in a step of one token per sequence, by the ragged one in any other; the config names
    the implementation of each.
    """
    if batch.query_starts is None or batch.num_seqs is None:
        output, written = paged_decode_attention(
            queries,
            kv_pages,
            batch.kv_lens,
            batch.page_table,
            scale=config.head_dim**-0.5,
            new_kv=new_kv,
            slots=batch.slots,
            implementation=config.decode_attention,
        )
    else:
        output, written = ragged_paged_attention(
            queries,
            kv_pages,
            batch.kv_lens,
            batch.page_table,
            batch.query_starts,
            batch.num_seqs,
            scale=config.head_dim**-0.5,
            new_kv=new_kv,
            slots=batch.slots,
            implementation=config.attention,
        )
    return output, written


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
    return linear(config, gate * linear(config, x, layer.up_proj), layer.down_proj)


def rms_norm(
    x: Float[Array, "*rows dim"], weight: Float[Array, " dim"], eps: float
) -> Float[Array, "*rows dim"]:
    """x scaled to root mean square 1 over its last axis, times the weight; float32 (arXiv 1910.07467)."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps) * broadcast(weight.astype(jnp.float32), x.ndim)
