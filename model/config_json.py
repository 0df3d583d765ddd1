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

from .config import ConfigError, Experts, Qwen3Config, Yarn
from .quantization_json import quantization_from_json

DENSE, SPARSE = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
MODEL_TYPES = {DENSE: "qwen3", SPARSE: "qwen3_moe"}
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
    "architectures", "dtype", "eos_token_id", "layer_types", "model_type", "quantization_config",
    "rope_parameters", "rope_scaling", "rope_theta", "torch_dtype",
}  # fmt: skip
# Fields without effect on inference; the sliding window's have none while use_sliding_window is false.
_WITHOUT_EFFECT = {
    "_attn_implementation_autoset", "_name_or_path", "attention_dropout", "bos_token_id", "initializer_range",
    "max_window_layers", "pad_token_id", "sliding_window", "transformers_version", "use_cache",
}  # fmt: skip
_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "use_sliding_window": (False, None)}
# What Qwen3-MoE has besides; transformers 5 calls num_experts num_local_experts.
_OF_EXPERTS = {
    "num_experts": int, "num_local_experts": int, "num_experts_per_tok": int, "moe_intermediate_size": int,
    "norm_topk_prob": bool, "decoder_sparse_step": int, "mlp_only_layers": list,
}  # fmt: skip
_WITHOUT_EFFECT_OF_EXPERTS = {"output_router_logits", "router_aux_loss_coef"}  # for training
# Qwen3-Coder's file says these; transformers reads none of them.
_ONLY_OF_EXPERTS: dict[str, tuple[Any, ...]] = {
    "qkv_bias": (False, None), "use_qk_norm": (True, None), "shared_expert_intermediate_size": (0, None),
}  # fmt: skip


def config_from_json(raw: Mapping[str, Any], *, source: str = "config.json") -> Qwen3Config:
    """A `Qwen3Config` from the contents of a `config.json`.

    The file's `dtype` (`torch_dtype`) is not part of it: see `stored_dtype`.

    Args:
        raw: the parsed file.
        source: what to call the file in errors.

    Raises:
        ConfigError: an architecture, field or value that is not supported, or a required field is missing.
    """
    architecture = _architecture(raw, source)
    _check_fields(raw, architecture, source)
    values: dict[str, Any] = {}
    for name, field in _USED.items():
        null_is_fine = name == "num_key_value_heads" and name in raw
        if field.required and raw.get(name) is None and not null_is_fine:
            raise ConfigError(f"{source}: the field {name!r} is missing")
        if raw.get(name) is not None:
            values[field.name] = _typed(raw[name], field.type, f"{source}: {name}")
    values.setdefault("num_kv_heads", values.get("num_q_heads"))  # null: as many as query heads
    theta, yarn = _read_rope(raw, source)
    eos_token_ids = eos_ids(raw.get("eos_token_id"), source)
    experts = None
    if architecture == SPARSE:
        experts = _read_experts(raw, values["num_layers"], source)
        if raw.get("head_dim") is None:  # transformers' default, which differs from that of a dense model
            values["head_dim"] = values["hidden_size"] // values["num_q_heads"]
    try:
        return Qwen3Config(
            **values,
            rope_theta=theta,
            yarn=yarn,
            experts=experts,
            eos_token_ids=eos_token_ids,
        )
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def config_to_json(config: Qwen3Config, dtype: np.dtype[Any]) -> dict[str, Any]:
    """The `config.json` that `config_from_json` reads: the model's shape, and not how to compute it.

    Args:
        config: the shape.
        dtype: of the parameters.
    """
    architecture = DENSE if config.experts is None else SPARSE
    rope: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.yarn is not None:
        options = {name: value for name, value in asdict(config.yarn).items() if value is not None}
        rope["rope_scaling"] = {"rope_type": "yarn"} | options
    return {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "hidden_act": _ONLY["hidden_act"][0],
        **{name: getattr(config, field.name) for name, field in _USED.items()},
        **_experts_to_json(config.experts),
        **rope,
        "eos_token_id": list(config.eos_token_ids) or None,
        "torch_dtype": dtype.name,
    }


def _experts_to_json(experts: Experts | None) -> dict[str, Any]:
    if experts is None:
        return {}
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(experts.dense_layers),
    }


def _architecture(raw: Mapping[str, Any], source: str) -> str:
    """The one that the file names, or else the one of its model_type, or else the dense one."""
    named, model_type = raw.get("architectures"), raw.get("model_type")
    if named and named not in ([DENSE], [SPARSE]):
        raise ConfigError(f"{source}: architectures={named!r}: supported are {[[DENSE], [SPARSE]]}")
    architecture = named[0] if named else SPARSE if model_type == MODEL_TYPES[SPARSE] else DENSE
    expected = MODEL_TYPES[architecture]
    if "model_type" in raw and model_type != expected:
        raise ConfigError(
            f"{source}: model_type={model_type!r}: supported is {expected!r} for {architecture}, and "
            f"{list(MODEL_TYPES.values())} in all"
        )
    return architecture


def _read_experts(raw: Mapping[str, Any], num_layers: int, source: str) -> Experts:
    values = {
        name: _typed(raw[name], kind, f"{source}: {name}")
        for name, kind in _OF_EXPERTS.items()
        if raw.get(name) is not None
    }
    counts = {values[name] for name in ("num_experts", "num_local_experts") if name in values}
    if len(counts) > 1:
        raise ConfigError(f"{source}: num_experts and num_local_experts differ: {sorted(counts)}")
    if not counts:
        raise ConfigError(f"{source}: the field 'num_experts' is missing")
    for name in ("num_experts_per_tok", "moe_intermediate_size"):
        if name not in values:
            raise ConfigError(f"{source}: the field {name!r} is missing")
    step, dense = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers", [])
    if step < 1:
        raise ConfigError(f"{source}: decoder_sparse_step={step}: must be at least 1")
    if not all(type(layer) is int and 0 <= layer < num_layers for layer in dense):
        raise ConfigError(
            f"{source}: mlp_only_layers={dense!r}: must be a list of layers from 0 to {num_layers - 1}"
        )
    try:
        return Experts(
            num_experts=counts.pop(),
            experts_per_token=values["num_experts_per_tok"],
            intermediate_size=values["moe_intermediate_size"],
            normalize_weights=values.get("norm_topk_prob", False),
            dense_layers=tuple(i for i in range(num_layers) if i in dense or (i + 1) % step),
        )
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_fields(raw: Mapping[str, Any], architecture: str, source: str) -> None:
    """Refuses what is not supported, by name."""
    only = _ONLY | (_ONLY_OF_EXPERTS if architecture == SPARSE else {})
    known = _USED.keys() | _USED_ELSEWHERE | _WITHOUT_EFFECT | only.keys()
    if architecture == SPARSE:
        known |= _OF_EXPERTS.keys() | _WITHOUT_EFFECT_OF_EXPERTS
    for name, values in only.items():
        if name in raw and raw[name] not in values:
            raise ConfigError(f"{source}: {name}={raw[name]!r}: supported is {values[0]!r}")
    quantization_from_json(raw, source=source)
    unknown = [name for name in raw if name not in known]
    if unknown:
        values = ", ".join(f"{name!r} (value {raw[name]!r})" for name in unknown)
        raise ConfigError(f"{source}: not supported: {values}; supported are the fields {sorted(known)}")
    layer_types = raw.get("layer_types")
    if layer_types is None:
        return
    count = _typed(raw.get("num_hidden_layers", 0), int, f"{source}: num_hidden_layers")
    layers = _typed(layer_types, list, f"{source}: layer_types")
    if len(layers) != count or any(kind != "full_attention" for kind in layers):
        raise ConfigError(
            f"{source}: layer_types={layer_types!r}: supported is 'full_attention' for each of the "
            f"{count} layers"
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

    kinds = {
        _typed(rope.pop(name), str, f"{where}: {name}") for name in ("rope_type", "type") if name in rope
    } or {"default"}
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
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{name}={value}: is beyond the range of float") from None
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
