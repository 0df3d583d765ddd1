"""The parameters of a Qwen3: a pytree of arrays, one entry per layer, and a description of every tensor.

Layers are never stacked into one array: on a CPU, XLA reads a slice of a stacked bfloat16 array ten times
slower than an array of its own. A layer's experts are: `jax.lax.ragged_dot` takes them so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
    """One decoder layer. Matrices are [out, in], as checkpoints store them; biases may be None.

    A layer with experts has a router, and its last three are [num_experts, in, out]: on a TPU,
    `jax.lax.ragged_dot` would copy all of [num_experts, out, in] at every step.
    """

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
    router: Leaf | None  # [num_experts, hidden]
    gate_proj: Leaf  # [intermediate, hidden] or [num_experts, hidden, intermediate]
    up_proj: Leaf  # as gate_proj
    down_proj: Leaf  # [hidden, intermediate] or [num_experts, intermediate, hidden]


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
    """What one parameter is called in a checkpoint, its shape, and the logical axis of each dimension.

    Attributes:
        name: in the checkpoint; of a parameter made of several tensors, what they would be called together.
        shape, axes: of the parameter; the axes are the names that `PartitionAxis.mesh_axes` maps to axes of
            the mesh.
        dtype: None where it is the one that is asked for.
        parts: the names of the matrices in the checkpoint that it is made of: each transposed, and stacked
            along the first axis. None for a parameter that is one tensor there.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: np.dtype[Any] | None = None
    parts: tuple[str, ...] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The tensors in the checkpoint."""
        return (self.name,) if self.parts is None else self.parts

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that each of them has there."""
        return self.shape if self.parts is None else self.shape[:0:-1]


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

        def experts(name: str, *dims: tuple[str, int]) -> Any:
            stacked: TensorSpec = spec(f"{mlp}experts.{name}.weight", *dims)
            parts = tuple(f"{mlp}experts.{i}.{name}.weight" for i in range(stacked.shape[0]))
            return replace(stacked, parts=parts)

        def mlp_specs() -> dict[str, Any]:
            if config.experts is None or not config.has_experts(index):
                return {
                    "router": None,
                    "gate_proj": spec(mlp + "gate_proj.weight", m, h),
                    "up_proj": spec(mlp + "up_proj.weight", m, h),
                    "down_proj": spec(mlp + "down_proj.weight", h, m),
                }
            e, inner = ("experts", config.experts.num_experts), ("mlp", config.experts.intermediate_size)
            return {
                "router": spec(mlp + "gate.weight", ("router", config.experts.num_experts), h),
                "gate_proj": experts("gate_proj", e, h, inner),
                "up_proj": experts("up_proj", e, h, inner),
                "down_proj": experts("down_proj", e, inner, h),
            }

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
            **mlp_specs(),
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


def num_active_parameters(config: Qwen3Config) -> int:
    """Parameters that have to do with one token: all but the experts that it does not take."""
    if config.experts is None:
        return num_parameters(config)
    stacked = sum(spec.size for spec in jax.tree.leaves(param_specs(config)) if spec.parts is not None)
    idle = config.experts.num_experts - config.experts.experts_per_token
    return num_parameters(config) - stacked // config.experts.num_experts * idle
