"""Reading a checkpoint's `config.json`, in the spelling of transformers 4 or 5.

Every field is either used, known to have no effect on inference, or refused by name: nothing is ignored
silently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .config import ConfigError, Qwen3Config, Yarn
from .quantization_json import quantization_from_json

ARCHITECTURE = "Qwen3ForCausalLM"
# What transformers takes where a file is silent, if that differs from what Qwen3's own files say.
DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True)
class _Field:
    """A field of config.json that is used: its name here, its type, whether a file must have it."""

    name: str
    type: type
    required: bool = False


_USED = {
    "vocab_size": _Field("vocab_size", int, required=True),
    "hidden_size": _Field("hidden_size", int, required=True),
    "intermediate_size": _Field("intermediate_size", int, required=True),
    "num_hidden_layers": _Field("num_layers", int, required=True),
    "num_attention_heads": _Field("num_q_heads", int, required=True),
    "num_key_value_heads": _Field("num_kv_heads", int, required=True),
    "max_position_embeddings": _Field("max_position_embeddings", int, required=True),
    "head_dim": _Field("head_dim", int),
    "rms_norm_eps": _Field("rms_norm_eps", float),
    "tie_word_embeddings": _Field("tie_word_embeddings", bool),
    "attention_bias": _Field("attention_bias", bool),
}
_USED_ELSEWHERE = {
    "architectures", "dtype", "eos_token_id", "layer_types", "quantization_config", "rope_parameters",
    "rope_scaling", "rope_theta", "torch_dtype",
}  # fmt: skip
# Fields without effect on inference; the sliding window's have none while use_sliding_window is false.
_WITHOUT_EFFECT = {
    "_attn_implementation_autoset", "_name_or_path", "attention_dropout", "bos_token_id", "initializer_range",
    "max_window_layers", "pad_token_id", "sliding_window", "transformers_version", "use_cache",
}  # fmt: skip
_ONLY = {"model_type": ("qwen3",), "hidden_act": ("silu",), "use_sliding_window": (False, None)}
_KNOWN = _USED.keys() | _USED_ELSEWHERE | _WITHOUT_EFFECT | _ONLY.keys()


def config_from_json(raw: Mapping[str, Any], *, source: str = "config.json") -> Qwen3Config:
    """A `Qwen3Config` from the contents of a `config.json`.

    The file's `dtype` (`torch_dtype`) is not part of it: see `stored_dtype`.

    Args:
        raw: the parsed file.
        source: what to call the file in errors.

    Raises:
        ConfigError: an architecture, field or value that is not supported, or a required field is missing.
    """
    _check_fields(raw, source)
    values: dict[str, Any] = {}
    for name, field in _USED.items():
        null_is_fine = name == "num_key_value_heads" and name in raw
        if field.required and raw.get(name) is None and not null_is_fine:
            raise ConfigError(f"{source}: the field {name!r} is missing")
        if raw.get(name) is not None:
            values[field.name] = _typed(raw[name], field.type, f"{source}: {name}")
    values.setdefault("num_kv_heads", values.get("num_q_heads"))  # null: as many as query heads
    theta, yarn = _read_rope(raw, source)
    try:
        return Qwen3Config(
            **values, rope_theta=theta, yarn=yarn, eos_token_ids=eos_ids(raw.get("eos_token_id"), source)
        )
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def config_to_json(config: Qwen3Config, dtype: np.dtype[Any]) -> dict[str, Any]:
    """The `config.json` that `config_from_json` reads: the model's shape, and not how to compute it.

    Args:
        config: the shape.
        dtype: of the parameters.
    """
    rope: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.yarn is not None:
        options = {name: value for name, value in asdict(config.yarn).items() if value is not None}
        rope["rope_scaling"] = {"rope_type": "yarn"} | options
    return {
        "architectures": [ARCHITECTURE],
        "model_type": _ONLY["model_type"][0],
        "hidden_act": _ONLY["hidden_act"][0],
        **{name: getattr(config, field.name) for name, field in _USED.items()},
        **rope,
        "eos_token_id": list(config.eos_token_ids) or None,
        "torch_dtype": dtype.name,
    }


def _check_fields(raw: Mapping[str, Any], source: str) -> None:
    """Refuses what is not supported, by name."""
    architectures = raw.get("architectures") or [ARCHITECTURE]
    if architectures != [ARCHITECTURE]:
        raise ConfigError(f"{source}: architectures={architectures!r}: supported is {[ARCHITECTURE]}")
    for name, values in _ONLY.items():
        if name in raw and raw[name] not in values:
            raise ConfigError(f"{source}: {name}={raw[name]!r}: supported is {values[0]!r}")
    quantization_from_json(raw, source=source)
    unknown = [name for name in raw if name not in _KNOWN]
    if unknown:
        values = ", ".join(f"{name!r} (value {raw[name]!r})" for name in unknown)
        raise ConfigError(f"{source}: not supported: {values}; supported are the fields {sorted(_KNOWN)}")
    layer_types = raw.get("layer_types")
    if layer_types is None:
        return
    expected = ["full_attention"] * _typed(
        raw.get("num_hidden_layers", 0), int, f"{source}: num_hidden_layers"
    )
    if layer_types != expected:
        raise ConfigError(
            f"{source}: layer_types={layer_types!r}: supported is 'full_attention' for each of the "
            f"{len(expected)} layers"
        )


def _read_rope(raw: Mapping[str, Any], source: str) -> tuple[float, Yarn | None]:
    """rope_theta and YaRN, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    given = {name: raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name) is not None}
    if len(given) > 1:
        raise ConfigError(f"{source}: both rope_parameters and rope_scaling are given, expected one: {given}")
    where, rope = next(iter(given.items()), ("rope_parameters", {}))
    if not isinstance(rope, dict):
        raise ConfigError(f"{source}: {where}={rope!r}: must be an object")
    where, rope = f"{source}: {where}", {name: value for name, value in rope.items() if value is not None}

    thetas = {
        _typed(value, float, f"{source}: rope_theta")
        for value in (raw.get("rope_theta"), rope.pop("rope_theta", None))
        if value is not None
    }
    if len(thetas) > 1:
        raise ConfigError(f"{where}: rope_theta is given twice, as {sorted(thetas)}")
    theta = thetas.pop() if thetas else DEFAULT_ROPE_THETA

    kinds = {rope.pop("rope_type", None), rope.pop("type", None)} - {None} or {"default"}
    if kinds not in ({"default"}, {"yarn"}):
        raise ConfigError(f"{where}: rope_type={sorted(kinds)}: supported is one of 'default' and 'yarn'")
    if kinds == {"yarn"}:
        return theta, _read_yarn(rope, raw, where)
    if rope:
        raise ConfigError(f"{where}: {rope}: rope_type 'default' has no such parameters")
    return theta, None


_YARN_TYPES = {
    "factor": float, "original_max_position_embeddings": int, "beta_fast": float, "beta_slow": float,
    "attention_factor": float, "truncate": bool, "mscale": float, "mscale_all_dim": float,
}  # fmt: skip


def _read_yarn(rope: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Yarn:
    unknown = {name: value for name, value in rope.items() if name not in _YARN_TYPES}
    if unknown:
        raise ConfigError(f"{where}: {unknown}: rope_type 'yarn' supports {sorted(_YARN_TYPES)}")
    if "factor" not in rope:
        raise ConfigError(f"{where}: rope_type 'yarn' needs 'factor'")
    values = {name: _typed(value, _YARN_TYPES[name], f"{where}: {name}") for name, value in rope.items()}
    values.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    mscale, mscale_all_dim = values.pop("mscale", None), values.pop("mscale_all_dim", None)
    if (mscale is None) != (mscale_all_dim is None):
        raise ConfigError(f"{where}: mscale and mscale_all_dim have an effect only together")
    if mscale is not None and "attention_factor" not in values:  # DeepSeek's form of the attention factor
        log = 0.1 * math.log(values["factor"]) if values["factor"] > 1 else 0.0
        values["attention_factor"] = (mscale * log + 1.0) / (mscale_all_dim * log + 1.0)
    assert values.keys() <= {field.name for field in fields(Yarn)}
    try:
        return Yarn(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def stored_dtype(raw: Mapping[str, Any], *, source: str = "config.json") -> str | None:
    """The name of the dtype that a `config.json` gives its weights, such as "bfloat16", or None.

    Raises:
        ConfigError: it is no name, or `dtype` and `torch_dtype` differ.
    """
    names = [raw[name] for name in ("dtype", "torch_dtype") if raw.get(name) is not None]
    if not all(isinstance(name, str) for name in names) or len(set(names)) > 1:
        raise ConfigError(f"{source}: dtype: {names!r}, expected one name")
    return names[0].removeprefix("torch.") if names else None


def eos_ids(eos: Any, source: str) -> tuple[int, ...]:
    """`eos_token_id`, which may be null, a token id or a list of them.

    Raises:
        ConfigError: it is none of these.
    """
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f"{source}: eos_token_id={eos!r}: must be a token id or a list of them")
    return tuple(ids)


def _typed(value: Any, expected: type, name: str) -> Any:
    """The value, which must have this type; an integer may stand for a float, but a bool for neither."""
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise ConfigError(f"{name}={value!r}: must be of type {expected.__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: the file is missing or holds no JSON object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: neither JSON nor UTF-8
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, expected a JSON object")
    return raw
