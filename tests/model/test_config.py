"""config.json in both spellings, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.model import ConfigError, Experts, Qwen3Config, Yarn, published_config
from vsurge.model.config import parse_dtype
from vsurge.model.config_json import config_from_json, read_json, stored_dtype

# As transformers 4.51 wrote it for Qwen3-8B.
FOUR: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def five(**changes: Any) -> dict[str, Any]:
    """The same model as transformers 5 writes it."""
    raw = {k: v for k, v in FOUR.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    raw |= {
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 36,
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "transformers_version": "5.23.0",
    }
    return raw | changes


# As transformers 4.51 wrote it for Qwen3-30B-A3B.
SPARSE: dict[str, Any] = FOUR | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def without_eos(config: Qwen3Config) -> dict[str, Any]:
    return vars(config) | {"eos_token_ids": ()}


def test_both_spellings_of_the_published_8b_give_its_published_shape():
    assert without_eos(config_from_json(FOUR)) == without_eos(published_config("Qwen/Qwen3-8B"))
    assert config_from_json(five()) == config_from_json(FOUR)
    assert config_from_json(FOUR).eos_token_ids == (151645,)


def test_what_the_installed_transformers_writes_is_read(tmp_path):
    from transformers import Qwen3Config as TheirConfig

    theirs = TheirConfig(
        num_hidden_layers=3,
        attention_bias=True,
        rms_norm_eps=1e-5,
        head_dim=64,
        rope_parameters={"rope_theta": 5e5, **YARN},
        eos_token_id=[3, 4],
        dtype="float32",
    )
    theirs.save_pretrained(tmp_path)
    raw = read_json(tmp_path / "config.json")
    config = config_from_json(raw)
    assert (config.num_layers, config.attention_bias, config.rms_norm_eps) == (3, True, 1e-5)
    assert (config.head_dim, config.rope_theta, config.eos_token_ids) == (64, 5e5, (3, 4))
    assert config.yarn == Yarn(4.0, 32768)
    assert stored_dtype(raw) == "float32"


@pytest.mark.parametrize(
    "kind", [{"type": "yarn"}, {"rope_type": "yarn"}, {"type": "yarn", "rope_type": "yarn"}]
)
def test_yarn_as_the_model_card_prescribes_reaches_131072_tokens_in_both_spellings(kind):
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, **kind}
    four = config_from_json(FOUR | {"rope_scaling": scaling})
    assert four.yarn == Yarn(factor=4.0, original_max_position_embeddings=32768)
    assert four.max_length == 131072
    assert config_from_json(five(rope_parameters={"rope_theta": 1e6, **scaling})) == four


def test_every_field_of_yarn_is_read():
    scaling = YARN | {
        "factor": 2,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 1.5,
        "truncate": False,
    }
    assert config_from_json(FOUR | {"rope_scaling": scaling}).yarn == Yarn(2.0, 32768, 16.0, 2.0, 1.5, False)


def test_fields_that_may_be_absent_take_the_value_transformers_gives_them():
    raw = {
        k: v for k, v in FOUR.items() if k not in ("head_dim", "rms_norm_eps", "rope_theta", "attention_bias")
    }
    config = config_from_json(raw)
    assert (config.head_dim, config.rms_norm_eps, config.rope_theta) == (128, 1e-6, 10000.0)
    assert config.attention_bias is False
    assert config_from_json(FOUR | {"num_key_value_heads": None}).num_kv_heads == 32


def test_a_published_shape_with_experts_is_read():
    expected = published_config("30B-A3B")
    assert without_eos(config_from_json(SPARSE)) == without_eos(expected)
    five = {name: value for name, value in SPARSE.items() if name != "num_experts"}
    assert config_from_json(five | {"num_local_experts": 128}) == config_from_json(SPARSE)
    coder = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    assert config_from_json(SPARSE | coder) == config_from_json(SPARSE)
    assert config_from_json(SPARSE | {"architectures": None}) == config_from_json(SPARSE)


def test_what_the_installed_transformers_writes_of_experts_is_read(tmp_path):
    from transformers import Qwen3MoeConfig

    Qwen3MoeConfig(num_hidden_layers=6, mlp_only_layers=[0, 3], decoder_sparse_step=2).save_pretrained(
        tmp_path
    )
    config = config_from_json(read_json(tmp_path / "config.json"))
    assert config.experts == Experts(128, 8, 768, normalize_weights=False, dense_layers=(0, 2, 3, 4))
    assert config.head_dim == 2048 // 32  # transformers' default, where a dense model's is 128


REFUSED_EXPERTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "type": ({"model_type": "qwen3"}, ["model_type='qwen3'", "'qwen3_moe'"]),
    "no number": ({"num_experts": None}, ["'num_experts' is missing"]),
    "two numbers": ({"num_local_experts": 64}, ["num_local_experts", "[64, 128]"]),
    "no size": ({"moe_intermediate_size": None}, ["'moe_intermediate_size' is missing"]),
    "none of them": ({"num_experts_per_tok": 0}, ["experts_per_token=0"]),
    "more than all": ({"num_experts_per_tok": 129}, ["experts_per_token=129", "num_experts=128"]),
    "a flag as a number": ({"norm_topk_prob": 1}, ["norm_topk_prob=1", "bool"]),
    "no step": ({"decoder_sparse_step": 0}, ["decoder_sparse_step=0"]),
    "layers as a number": ({"mlp_only_layers": 3}, ["mlp_only_layers=3", "list"]),
    "a layer too many": ({"mlp_only_layers": [0, 48]}, ["mlp_only_layers=[0, 48]", "47"]),
    "a shared expert": ({"shared_expert_intermediate_size": 512}, ["shared_expert_intermediate_size=512"]),
    "unknown field": ({"n_group": 4}, ["'n_group'", "num_experts"]),
}


@pytest.mark.parametrize("case", REFUSED_EXPERTS)
def test_what_is_not_supported_of_experts_is_named(case):
    changes, parts = REFUSED_EXPERTS[case]
    with pytest.raises(ConfigError, match=r"some/config\.json") as caught:
        config_from_json(SPARSE | changes, source="some/config.json")
    for part in parts:
        assert part in str(caught.value)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "architecture": ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "Qwen3MoeForCausalLM"]),
    "architecture of another type": ({"architectures": ["Qwen3MoeForCausalLM"]}, ["'qwen3'", "'qwen3_moe'"]),
    "two architectures": ({"architectures": ["Qwen3ForCausalLM", "X"]}, ["'X'"]),
    "architectures no list": ({"architectures": 3}, ["architectures=3"]),
    "model_type": ({"model_type": "qwen2"}, ["model_type='qwen2'", "'qwen3'"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
    "unknown field": ({"num_experts": 128}, ["'num_experts'", "128", "head_dim"]),
    "two unknown fields": ({"aaa": 1, "bbb": 2}, ["'aaa'", "'bbb'"]),
    "sliding window": ({"use_sliding_window": True}, ["use_sliding_window=True"]),
    "sliding layers": (
        {"layer_types": ["full_attention"] * 35 + ["sliding_attention"]},
        ["layer_types", "sliding_attention"],
    ),
    "too few layer types": ({"layer_types": ["full_attention"]}, ["layer_types", "36"]),
    "quantization": ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "'gptq'"]),
    "rope type": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ["rope_scaling", "'linear'", "'yarn'"],
    ),
    "a rope type that is no name": ({"rope_scaling": {"rope_type": ["yarn"]}}, ["rope_type=['yarn']", "str"]),
    "two rope types": (
        {"rope_scaling": {"rope_type": "yarn", "type": "default", "factor": 2.0}},
        ["rope_type"],
    ),
    "field of no rope": (
        {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
        ["rope_scaling", "factor"],
    ),
    "unknown field of YaRN": ({"rope_scaling": YARN | {"short_factor": [1]}}, ["short_factor", "beta_fast"]),
    "YaRN without factor": ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_scaling", "factor"]),
    "YaRN that shrinks": ({"rope_scaling": YARN | {"factor": 0.5}}, ["factor=0.5"]),
    "YaRN with half its mscale": ({"rope_scaling": YARN | {"mscale": 1.0}}, ["mscale_all_dim"]),
    "YaRN over no tokens": ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, ["=0"]),
    "YaRN with betas swapped": ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, ["beta_fast=1"]),
    "rope as a string": ({"rope_scaling": "yarn"}, ["rope_scaling='yarn'"]),
    "rope in both spellings": (
        {"rope_scaling": YARN, "rope_parameters": YARN},
        ["rope_parameters", "rope_scaling"],
    ),
    "rope_theta twice": ({"rope_parameters": {"rope_theta": 5.0}}, ["rope_theta", "5.0", "1000000.0"]),
    "a size as a string": ({"hidden_size": "4096"}, ["hidden_size='4096'", "int"]),
    "a size of nothing": ({"num_hidden_layers": 0}, ["num_layers=0"]),
    "a bool as a string": ({"attention_bias": "false"}, ["attention_bias='false'", "bool"]),
    "a bool for a size": ({"vocab_size": True}, ["vocab_size=True"]),
    "an epsilon of zero": ({"rms_norm_eps": 0}, ["rms_norm_eps=0"]),
    "a theta without end": ({"rope_theta": math.inf}, ["rope_theta=inf", "finite"]),
    "YaRN without end": ({"rope_scaling": YARN | {"factor": math.inf}}, ["factor=inf", "finite"]),
    "YaRN beyond float": (
        {"rope_scaling": YARN | {"factor": 10**400}},
        ["rope_scaling: factor=1000", "float"],
    ),
    "YaRN beyond int32": ({"rope_scaling": YARN | {"factor": 1e30}}, ["factor=1e+30", "2147483647"]),
    "a theta beyond float": ({"rope_theta": 10**400}, ["rope_theta=1000", "float"]),
    "a size beyond int32": ({"max_position_embeddings": 2**31}, ["max_position_embeddings=2147483648"]),
    "layer types of no list": ({"layer_types": 36}, ["layer_types=36", "list"]),
    "heads that do not divide": ({"num_key_value_heads": 5}, ["32", "5"]),
    "odd head_dim": ({"head_dim": 127}, ["head_dim=127"]),
    "eos as text": ({"eos_token_id": "</s>"}, ["eos_token_id='</s>'"]),
    "negative eos": ({"eos_token_id": [1, -1]}, ["eos_token_id"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named(case):
    changes, parts = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        config_from_json(FOUR | changes, source="some/config.json")
    assert caught.match("some/config.json")
    assert str(caught.value).count("some/config.json") == 1
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
     "num_key_value_heads", "max_position_embeddings"],
)  # fmt: skip
def test_a_size_that_is_missing_is_named(name):
    with pytest.raises(ConfigError, match=f"'{name}' is missing"):
        config_from_json({k: v for k, v in FOUR.items() if k != name})
    if name != "num_key_value_heads":  # null there means as many as query heads
        with pytest.raises(ConfigError, match=f"'{name}' is missing"):
            config_from_json(FOUR | {name: None})


def test_a_dtype_has_one_name():
    assert stored_dtype({"dtype": "bfloat16", "torch_dtype": "bfloat16"}) == "bfloat16"
    assert stored_dtype({}) is None
    with pytest.raises(ConfigError, match=r"float32.*float16"):
        stored_dtype({"dtype": "float32", "torch_dtype": "float16"})
    with pytest.raises(ConfigError, match=r"float64.*bfloat16"):
        parse_dtype("float64", "dtype")
    assert parse_dtype(jnp.bfloat16, "dtype") == jnp.bfloat16
    assert parse_dtype(np.float32, "dtype") == np.float32


def test_the_cache_may_have_8_bits_but_not_the_computation():
    config = published_config("0.6B")
    for dtype in (jnp.int8, jnp.float8_e4m3fn):
        assert replace(config, kv_dtype=np.dtype(dtype)).cache_dtype == dtype
        with pytest.raises(ConfigError, match=r"^dtype=.*8.*: supported are \['bfloat16', 'float32'\]"):
            replace(config, dtype=np.dtype(dtype))
    with pytest.raises(ConfigError, match=r"^kv_dtype=float16: supported are .*'int8', 'float8_e4m3fn'"):
        replace(config, kv_dtype=np.dtype("float16"))


def test_what_is_no_dtype_is_named(no_type_checker):
    with pytest.raises(ConfigError, match=r"^dtype=3: supported are"):
        parse_dtype(3, "dtype")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON"), (b"\xff\xff", "not valid JSON"), (b"[1]", "list"), (None, "no such file")],
)
def test_a_file_that_holds_no_object_is_named(content, message, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "qwen3-0.6b", "0.6B"])
def test_a_published_shape_goes_by_three_names(name):
    assert published_config(name).hidden_size == 1024


def test_an_unpublished_shape_lists_the_published_ones():
    with pytest.raises(ConfigError, match=r"0\.5B.*Qwen/Qwen3-0\.6B.*Qwen/Qwen3-32B"):
        published_config("0.5B")
