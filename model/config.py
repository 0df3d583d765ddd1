"""The shape of a Qwen3 model, read from `config.json` and `generation_config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..kernels import Implementation

SUPPORTED_ARCHITECTURE = "Qwen3ForCausalLM"


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


@dataclass(frozen=True)
class Qwen3Config:
    """A dense Qwen3, and how to compute it. Hashable, so it can be a static argument of a jitted function.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_layers: as in the checkpoint.
        num_q_heads, num_kv_heads, head_dim: attention heads; num_q_heads is a multiple of num_kv_heads.
        max_position_embeddings: longest sequence, tokens.
        rms_norm_eps: added to the mean square in RMSNorm.
        rope_theta, yarn: rotary position embedding.
        tie_word_embeddings: whether the embedding matrix is also the output matrix.
        attention_bias: whether the four attention projections have a bias.
        eos_token_ids: tokens that end a sequence.
        dtype: of the operands of matrix products; sums, norms and the residual stream are float32.
        kv_dtype: of the cache; None for `dtype`.
        matmul_precision: None for HIGHEST in float32, DEFAULT otherwise.
        attention, decode_attention: implementation of the attention kernels; None for the best one here.
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
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: np.dtype[Any] = np.dtype(jnp.bfloat16)
    kv_dtype: np.dtype[Any] | None = None
    matmul_precision: jax.lax.Precision | None = None
    attention: Implementation | None = None
    decode_attention: Implementation | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_q_heads",
                     "num_kv_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ConfigError(f"{name}={size!r}: must be a positive integer")
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_q_heads={self.num_q_heads}: must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: must be even for rotary embeddings")
        if self.dtype not in (np.dtype(jnp.bfloat16), np.dtype(np.float32)):
            raise ConfigError(f"dtype={self.dtype}: computation is supported in bfloat16 and float32")

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


# config.json field -> Qwen3Config field
_RENAMED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_q_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Fields that say nothing about inference, or that only the values listed are supported of.
_WITHOUT_EFFECT = {
    "_name_or_path", "attention_dropout", "bos_token_id", "initializer_range", "max_window_layers",
    "pad_token_id", "sliding_window", "transformers_version", "use_cache",
}  # fmt: skip
_ONLY = {"model_type": ("qwen3",), "hidden_act": ("silu",), "use_sliding_window": (False, None)}


def config_from_json(raw: Mapping[str, Any], *, source: str = "config.json") -> Qwen3Config:
    """A `Qwen3Config` from the contents of a `config.json`, as transformers 4 or 5 writes it.

    Args:
        raw: the parsed file.
        source: what to call the file in errors.

    Raises:
        ConfigError: an architecture, field or value that is not supported, or a required field is missing.
    """
    architectures = raw.get("architectures") or [SUPPORTED_ARCHITECTURE]
    if list(architectures) != [SUPPORTED_ARCHITECTURE]:
        raise ConfigError(
            f"{source}: architectures={architectures}: supported is [{SUPPORTED_ARCHITECTURE!r}]"
        )
    for name in _REQUIRED:
        if name not in raw:
            raise ConfigError(f"{source}: the field {name!r} is missing")
    rope_fields = {"rope_theta", "rope_scaling", "rope_parameters"}
    handled = {"architectures", "eos_token_id", "torch_dtype", "dtype", "layer_types"} | rope_fields
    for name, value in raw.items():
        if name in _ONLY and value not in _ONLY[name]:
            raise ConfigError(f"{source}: {name}={value!r}: supported is {_ONLY[name][0]!r}")
        if name not in _RENAMED.keys() | _WITHOUT_EFFECT | _ONLY.keys() | handled:
            raise ConfigError(
                f"{source}: the field {name!r} (value {value!r}) is not supported; supported are "
                f"{sorted(_RENAMED.keys() | _WITHOUT_EFFECT | _ONLY.keys() | handled)}"
            )
    layer_types = raw.get("layer_types") or []
    if set(layer_types) - {"full_attention"}:
        raise ConfigError(f"{source}: layer_types={sorted(set(layer_types))}: supported is 'full_attention'")

    values = {ours: raw[theirs] for theirs, ours in _RENAMED.items() if raw.get(theirs) is not None}
    values.setdefault("num_kv_heads", raw["num_attention_heads"])
    theta, yarn = _read_rope(raw, source)
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    return Qwen3Config(
        **values,
        rope_theta=theta,
        yarn=yarn,
        eos_token_ids=_as_ids(raw.get("eos_token_id"), source),
        dtype=parse_dtype(dtype, f"{source}: dtype"),
    )


def _read_rope(raw: Mapping[str, Any], source: str) -> tuple[float, Yarn | None]:
    """rope_theta and YaRN, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    field = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    rope = dict(raw.get(field) or {})
    theta = float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind not in ("default", "yarn"):
        raise ConfigError(f"{source}: {field}: rope_type={kind!r}: supported are 'default' and 'yarn'")
    names = {f.name for f in fields(Yarn)} if kind == "yarn" else set[str]()
    unknown = {name: value for name, value in rope.items() if name not in names and value is not None}
    if unknown:
        raise ConfigError(
            f"{source}: {field}: {unknown} not supported for rope_type={kind!r}: {sorted(names)}"
        )
    if kind == "default":
        return theta, None
    rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    missing = [n for n in ("factor", "original_max_position_embeddings") if not rope.get(n)]
    if missing:
        raise ConfigError(f"{source}: {field}: rope_type='yarn' needs {missing}")
    return theta, Yarn(**{name: value for name, value in rope.items() if value is not None})


def parse_dtype(dtype: DTypeLike | str, name: str) -> np.dtype[Any]:
    """bfloat16 or float32 as a NumPy dtype.

    Raises:
        ConfigError: another dtype, named `name` in the message.
    """
    supported = {"bfloat16": np.dtype(jnp.bfloat16), "float32": np.dtype(np.float32)}
    key = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if key not in supported:
        raise ConfigError(f"{name}={key!r}: supported are {sorted(supported)}")
    return supported[key]


def _as_ids(eos: Any, source: str) -> tuple[int, ...]:
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ConfigError(f"{source}: eos_token_id={eos!r}: must be token ids")
    return ids


@dataclass(frozen=True)
class GenerationDefaults:
    """What `generation_config.json` asks for where a request says nothing.

    Attributes:
        eos_token_ids: tokens that end a sequence.
        sampling: sampling parameters by their vLLM names, as far as the file sets them.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: tuple[tuple[str, float | int], ...] = ()


_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def generation_defaults_from_json(
    raw: Mapping[str, Any], *, source: str = "generation_config.json"
) -> GenerationDefaults:
    """The defaults in a `generation_config.json`; `do_sample: false` means temperature 0."""
    sampling = {name: raw[name] for name in _SAMPLING_FIELDS if raw.get(name) is not None}
    if raw.get("do_sample") is False:
        sampling = {"temperature": 0.0}
    return GenerationDefaults(_as_ids(raw.get("eos_token_id"), source), tuple(sampling.items()))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: the file is missing or holds no JSON object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, expected a JSON object")
    return raw


def _published(hidden: int, intermediate: int, layers: int, q_heads: int, *, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=8,
        tie_word_embeddings=tied,
        eos_token_ids=(151645, 151643),
    )


# The dense Qwen3 family, from the config.json of each model on the Hugging Face hub.
PUBLISHED = {
    "Qwen/Qwen3-0.6B": _published(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _published(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _published(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _published(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": _published(5120, 17408, 40, 40, tied=False),
    "Qwen/Qwen3-32B": _published(5120, 25600, 64, 64, tied=False),
}


def published_config(name: str) -> Qwen3Config:
    """The configuration of a published model, "Qwen/Qwen3-0.6B" or just "0.6B".

    Raises:
        ConfigError: no such model; the message lists those there are.
    """
    for full_name, config in PUBLISHED.items():
        if name.lower() in (
            full_name.lower(),
            full_name.split("/")[1].lower(),
            full_name.split("-")[1].lower(),
        ):
            return config
    raise ConfigError(f"{name!r}: no published shape of that name; there are {list(PUBLISHED)}")
