"""The parameters of a Qwen3: a pytree of arrays, one entry per layer, and a description of every tensor.

Layers are never stacked into one array: on a CPU, XLA reads a slice of a stacked bfloat16 array ten times
slower than an array of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .config import Qwen3Config

if TYPE_CHECKING:
    Leaf = jax.Array
else:  # a leaf may also be a TensorSpec, a sharding or a ShapeDtypeStruct
    Leaf = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerParams:
    """One decoder layer. Matrices are [out, in], as checkpoints store them; biases may be None."""

    input_norm: Leaf  # [hidden]
    q_proj: Leaf  # [num_q_heads * head_dim, hidden]
    k_proj: Leaf  # [num_kv_heads * head_dim, hidden]
    v_proj: Leaf  # [num_kv_heads * head_dim, hidden]
    o_proj: Leaf  # [hidden, num_q_heads * head_dim]
    q_bias: Leaf | None
    k_bias: Leaf | None
    v_bias: Leaf | None
    o_bias: Leaf | None
    q_norm: Leaf  # [head_dim]
    k_norm: Leaf  # [head_dim]
    post_attention_norm: Leaf  # [hidden]
    gate_proj: Leaf  # [intermediate, hidden]
    up_proj: Leaf  # [intermediate, hidden]
    down_proj: Leaf  # [hidden, intermediate]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """All parameters. `lm_head` is None where the embedding is tied."""

    embedding: Leaf  # [vocab, hidden]
    layers: tuple[LayerParams, ...]
    final_norm: Leaf  # [hidden]
    lm_head: Leaf | None  # [vocab, hidden]


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor is called in a checkpoint, its shape, and the logical axis of each dimension.

    `axes` are the names that `PartitionAxis.mesh_axes` maps to axes of the mesh; `dtype` is None where it is
    the one that is asked for.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: np.dtype[Any] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def param_specs(config: Qwen3Config) -> Params:
    """A `Params` whose leaves are `TensorSpec`s."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def spec(name: str, *dims: tuple[str, int]) -> Any:
        return TensorSpec(name, tuple(size for _, size in dims), tuple(axis for axis, _ in dims))

    def layer(index: int) -> LayerParams:
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        q, kv, h, m = ("q_heads", q_size), ("kv_heads", kv_size), ("hidden", hidden), ("mlp", inter)

        def bias(name: str, dim: tuple[str, int]) -> Any:
            return spec(attention + name + ".bias", dim) if config.attention_bias else None

        return LayerParams(
            input_norm=spec(prefix + "input_layernorm.weight", ("norm", hidden)),
            q_proj=spec(attention + "q_proj.weight", q, h),
            k_proj=spec(attention + "k_proj.weight", kv, h),
            v_proj=spec(attention + "v_proj.weight", kv, h),
            o_proj=spec(attention + "o_proj.weight", h, q),
            q_bias=bias("q_proj", q),
            k_bias=bias("k_proj", kv),
            v_bias=bias("v_proj", kv),
            o_bias=bias("o_proj", h),
            q_norm=spec(attention + "q_norm.weight", ("norm", config.head_dim)),
            k_norm=spec(attention + "k_norm.weight", ("norm", config.head_dim)),
            post_attention_norm=spec(prefix + "post_attention_layernorm.weight", ("norm", hidden)),
            gate_proj=spec(mlp + "gate_proj.weight", m, h),
            up_proj=spec(mlp + "up_proj.weight", m, h),
            down_proj=spec(mlp + "down_proj.weight", h, m),
        )

    vocab = ("vocab", config.vocab_size)
    return Params(
        embedding=spec("model.embed_tokens.weight", vocab, ("hidden", hidden)),
        layers=tuple(layer(i) for i in range(config.num_layers)),
        final_norm=spec("model.norm.weight", ("norm", hidden)),
        lm_head=None if config.tie_word_embeddings else spec("lm_head.weight", vocab, ("hidden", hidden)),
    )


def num_parameters(config: Qwen3Config) -> int:
    """Parameters of the model; a tied embedding counts once."""
    return sum(spec.size for spec in jax.tree.leaves(param_specs(config)))
