"""The shape of a Qwen3 model, and the shapes that are published."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..kernels import SUPPORTED_DTYPES as CACHE_DTYPES
from ..kernels import Implementation

BFLOAT16, FLOAT32 = np.dtype(jnp.bfloat16), np.dtype(np.float32)
COMPUTE_DTYPES = (BFLOAT16, FLOAT32)
MAX_SIZE = 2**31 - 1  # tokens and positions are int32


class ConfigError(ValueError):
    """A configuration that this model cannot honour; the message names field, value and what is supported."""


@dataclass(frozen=True)
class Yarn:
    """YaRN: rotary frequencies stretched beyond the trained context (arXiv 2309.00071).

    Attributes:
        factor: how many times the trained context.
        original_max_position_embeddings: the trained context, tokens.
        beta_fast, beta_slow: rotations over the trained context above which a frequency is kept, and below
            which it is divided by `factor`; in between it is blended.
        attention_factor: factor on cosine and sine; None for `0.1 ln(factor) + 1`.
        truncate: whether the blended range is rounded outwards to whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ConfigError(f"factor={self.factor!r} of YaRN: must be a finite number of at least 1")
        length = self.original_max_position_embeddings
        if type(length) is not int or not 1 <= length <= MAX_SIZE / self.factor:
            raise ConfigError(
                f"original_max_position_embeddings={length!r} of YaRN: must be a positive integer, and times "
                f"factor={self.factor!r} at most {MAX_SIZE}"
            )
        if not self.beta_fast >= self.beta_slow > 0:
            raise ConfigError(
                f"beta_fast={self.beta_fast!r}, beta_slow={self.beta_slow!r} of YaRN: beta_fast must be at "
                "least beta_slow, which must be positive"
            )


@dataclass(frozen=True)
class Experts:
    """Experts in the place of a layer's MLP, of which each token takes a few (Qwen3-MoE).

    Attributes:
        num_experts: of each layer.
        experts_per_token: how many of them a token takes.
        intermediate_size: the inner dimension of an expert.
        normalize_weights: whether the weights of the experts that a token takes are divided by their sum.
        dense_layers: the layers that have one MLP of `Qwen3Config.intermediate_size` instead, ascending.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalize_weights: bool = False
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "intermediate_size"):
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= MAX_SIZE:
                raise ConfigError(
                    f"{name}={size!r} of the experts: must be a positive integer, at most {MAX_SIZE}"
                )
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token}: must be at most num_experts={self.num_experts}"
            )


@dataclass(frozen=True)
class Qwen3Config:
    """A Qwen3, and how to compute it. Hashable, so it can be a static argument of a jitted function.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_layers: as in the checkpoint.
        num_q_heads, num_kv_heads, head_dim: attention heads; num_q_heads is a multiple of num_kv_heads.
        max_position_embeddings: longest sequence, tokens.
        rms_norm_eps: added to the mean square in RMSNorm.
        rope_theta, yarn: rotary position embedding.
        experts: what Qwen3-MoE has in the place of the MLP; None in a dense model.
        tie_word_embeddings: whether the embedding matrix is also the output matrix.
        attention_bias: whether the four attention projections have a bias.
        eos_token_ids: tokens that end a sequence.
        dtype: of the operands of matrix products; sums, norms and the residual stream are float32.
        kv_dtype: of the cache, bfloat16, float32, int8 or float8_e4m3fn (see `kernels.empty_kv_pages`); None
            for `dtype`.
        matmul_precision: None for HIGHEST in float32, DEFAULT otherwise.
        int8_activations: whether products with a8bit weights (see `quantization`) round the other operand to
            int8 too, with a scale per token; None for where that is the fast form and `dtype` is bfloat16: on
            a CPU.
        all_reduce_dtype: in which devices that share a layer send each other their parts of what `o_proj`,
            `down_proj` and experts give, float32 or bfloat16; None for `dtype`, but on a CPU float32, where
            nothing is saved. Sums of int8 products are sent in int32 and those of nf4 weights in float32,
            but for experts'.
        attention, decode_attention: implementation of attention and the cache write, in steps of any tokens
            and in steps of one token per sequence; None for the best one here.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128
    max_position_embeddings: int = 40960
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    yarn: Yarn | None = None
    experts: Experts | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: np.dtype[Any] = BFLOAT16
    kv_dtype: np.dtype[Any] | None = None
    matmul_precision: jax.lax.Precision | None = None
    int8_activations: bool | None = None
    all_reduce_dtype: np.dtype[Any] | None = None
    attention: Implementation | None = None
    decode_attention: Implementation | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_q_heads",
                     "num_kv_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= MAX_SIZE:
                raise ConfigError(f"{name}={size!r}: must be a positive integer, at most {MAX_SIZE}")
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_q_heads={self.num_q_heads}: must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.experts is not None and not set(self.experts.dense_layers) <= set(range(self.num_layers)):
            raise ConfigError(
                f"dense_layers={self.experts.dense_layers}: must be among the {self.num_layers} layers"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: must be even for rotary embeddings")
        if self.int8_activations not in (None, True, False):
            raise ConfigError(f"int8_activations={self.int8_activations!r}: must be True, False or None")
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be positive and finite")
        for name, dtype, supported in (
            ("dtype", self.dtype, COMPUTE_DTYPES),
            ("kv_dtype", self.cache_dtype, CACHE_DTYPES),
            (
                "all_reduce_dtype",
                self.dtype if self.all_reduce_dtype is None else self.all_reduce_dtype,
                COMPUTE_DTYPES,
            ),
        ):
            if dtype not in supported:
                raise ConfigError(f"{name}={dtype}: supported are {[d.name for d in supported]}")

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in the place of its MLP."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def max_length(self) -> int:
        """Longest sequence the position embedding reaches, tokens."""
        if self.yarn is None:
            return self.max_position_embeddings
        stretched = int(self.yarn.factor * self.yarn.original_max_position_embeddings)
        return max(self.max_position_embeddings, stretched)

    @property
    def cache_dtype(self) -> np.dtype[Any]:
        """dtype of the key/value cache."""
        return self.dtype if self.kv_dtype is None else self.kv_dtype


def parse_dtype(
    dtype: DTypeLike | str, name: str, allowed: Collection[np.dtype[Any]] = COMPUTE_DTYPES
) -> np.dtype[Any]:
    """One of some dtypes, by default bfloat16 and float32, as a NumPy dtype.

    Raises:
        ConfigError: another dtype, named `name` in the message.
    """
    supported = {one.name: one for one in allowed}
    key: Any
    try:
        # NumPy takes None for float64
        key = dtype if dtype is None or isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:  # no dtype at all
        key = dtype
    if not isinstance(key, str) or key not in supported:
        raise ConfigError(f"{name}={key!r}: supported are {sorted(supported)}")
    return supported[key]


def _published(
    hidden: int,
    intermediate: int,
    layers: int,
    q_heads: int,
    *,
    tied: bool = False,
    kv_heads: int = 8,
    experts: Experts | None = None,
) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        experts=experts,
        tie_word_embeddings=tied,
        eos_token_ids=(151645, 151643),
    )


def _published_experts(intermediate: int) -> Experts:
    return Experts(128, 8, intermediate, normalize_weights=True)


# The Qwen3 family, from the config.json of each model on the Hugging Face hub.
PUBLISHED = {
    "Qwen/Qwen3-0.6B": _published(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _published(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _published(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _published(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": _published(5120, 17408, 40, 40, tied=False),
    "Qwen/Qwen3-32B": _published(5120, 25600, 64, 64, tied=False),
    "Qwen/Qwen3-30B-A3B": _published(2048, 6144, 48, 32, kv_heads=4, experts=_published_experts(768)),
    "Qwen/Qwen3-235B-A22B": _published(4096, 12288, 94, 64, kv_heads=4, experts=_published_experts(1536)),
}


def published_config(name: str) -> Qwen3Config:
    """The configuration of a published model, "Qwen/Qwen3-0.6B" or just "0.6B".

    Raises:
        ConfigError: no such model; the message lists those there are.
    """
    for full_name, config in PUBLISHED.items():
        short = full_name.removeprefix("Qwen/")
        if name.lower() in (full_name.lower(), short.lower(), short.removeprefix("Qwen3-").lower()):
            return config
    raise ConfigError(f"{name!r}: no published shape of that name; there are {list(PUBLISHED)}")
