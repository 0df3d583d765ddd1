"""Every option of EasyDeL's spelling has its effect, or is refused at once by name and value."""

from __future__ import annotations

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vsurge
import vsurge.easydel as ed
from vsurge.kernels import dispatch, empty_kv_pages
from vsurge.model.loading import read_config
from vsurge.model.qwen3 import Batch, forward

from ..kernels.jaxprs import equations

LONGEST = read_config(vsurge.demo_model_path()).max_length
Attention = ed.AttentionMechanisms
Quantization = ed.EasyDeLQuantizationMethods


def load(**options: Any) -> ed.EasyDeLModel:
    return ed.AutoEasyDeLModelForCausalLM.from_pretrained(str(vsurge.demo_model_path()), **options)


def load_with(**config_kwargs: Any) -> ed.EasyDeLModel:
    return load(config_kwargs=ed.EasyDeLBaseConfigDict(**config_kwargs))


def test_without_options_the_model_is_load_models() -> None:
    model, plain = load(), vsurge.load_model(vsurge.demo_model_path())
    assert model.config == plain.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model.params, plain.params))
    assert (model.mesh, model.source, model.eos_token_ids) == (plain.mesh, plain.source, plain.eos_token_ids)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "computes_in", "stores"),
    [
        (jnp.float32, jnp.bfloat16, "float32", "bfloat16"),
        (jnp.bfloat16, jnp.float32, "bfloat16", "float32"),
        (None, jnp.float32, "float32", "float32"),
        (None, None, "bfloat16", "bfloat16"),
    ],
)
def test_dtype_is_what_it_computes_in_and_param_dtype_what_it_stores(
    dtype: Any, param_dtype: Any, computes_in: str, stores: str
) -> None:
    model = load(dtype=dtype, param_dtype=param_dtype)
    assert model.config.dtype == computes_in
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {stores}


@pytest.mark.parametrize("precision", jax.lax.Precision)
def test_precision_is_that_of_matrix_products(precision: jax.lax.Precision) -> None:
    assert load(precision=precision).config.matmul_precision is precision


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"precision": "high"}, r"precision='high': must be a jax\.lax\.Precision"),
        ({"partition_axis": "tp"}, "partition_axis='tp': must be a PartitionAxis"),
        ({"config_kwargs": "kvdtype"}, "config_kwargs='kvdtype': must be an EasyDeLBaseConfigDict"),
    ],
)
def test_an_option_of_another_type_is_refused(
    option: dict[str, Any], message: str, no_type_checker: None
) -> None:
    with pytest.raises(TypeError, match=message):
        load(**option)


@pytest.mark.parametrize("dtype", [jnp.float32, "bfloat16", jnp.int8, "float8_e4m3fn"])
def test_kvdtype_is_that_of_the_cache(dtype: Any) -> None:
    assert load_with(kvdtype=dtype).config.cache_dtype == jnp.dtype(dtype)


@pytest.mark.parametrize(
    ("limits", "max_length"),
    [
        ({"freq_max_position_embeddings": 512, "mask_max_position_embeddings": 256}, 256),
        ({"freq_max_position_embeddings": 128, "mask_max_position_embeddings": 256}, 128),
        ({"mask_max_position_embeddings": np.int64(64)}, 64),
        ({}, LONGEST),
    ],
)
def test_the_smaller_position_limit_is_the_engines_default_length(
    limits: dict[str, Any], max_length: int
) -> None:
    model = load_with(**limits)
    for build in (ed.vSurge.from_model, ed.vSurge.create_odriver):
        surge = build(model)
        assert type(surge) is ed.vSurge
        assert surge.max_length == max_length
        assert build(model, max_length=48).max_length == 48


@pytest.mark.parametrize("name", ["freq_max_position_embeddings", "mask_max_position_embeddings"])
def test_a_limit_beyond_the_models_is_an_error_with_both_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}={LONGEST + 1}: .* reaches {LONGEST} tokens"):
        load_with(**{name: LONGEST + 1})
    with pytest.raises(ValueError, match=rf"{name}=0: must be a number of tokens"):
        load_with(**{name: 0})


@pytest.mark.parametrize(
    ("mechanism", "implementation"),
    [
        (Attention.AUTO, None),
        (Attention.RAGGED_PAGE_ATTENTION, None),
        (Attention.PAGED_ATTENTION, None),
        (Attention.REGRESSIVE_DECODE, None),
        (Attention.VANILLA, "xla"),
        (Attention.SDPA, "xla"),
    ],
)
def test_attention_mechanisms_choose_the_kernels(mechanism: Any, implementation: str | None) -> None:
    prefill, decode = load_with(attn_mechanism=mechanism), load_with(decode_attn_mechanism=mechanism)
    assert (prefill.config.attention, prefill.config.decode_attention) == (implementation, None)
    assert (decode.config.attention, decode.config.decode_attention) == (None, implementation)


@pytest.mark.parametrize("mechanism", ed.ATTENTION)
@pytest.mark.parametrize("name", ["attn_mechanism", "decode_attn_mechanism"])
def test_the_mechanism_decides_whether_a_step_runs_the_devices_kernels(
    name: str, mechanism: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch.PREFERRED, "cpu", "mosaic_tpu")  # as if this were a device that has some
    other = "decode_attn_mechanism" if name == "attn_mechanism" else "attn_mechanism"
    model = load_with(**{name: mechanism, other: Attention.VANILLA})
    plain = mechanism in (Attention.VANILLA, Attention.SDPA)
    for decodes in (False, True):
        chosen = decodes == (name == "decode_attn_mechanism")
        assert runs_kernels(model, decodes=decodes) == (chosen and not plain)


def runs_kernels(model: ed.EasyDeLModel, *, decodes: bool) -> bool:
    """Whether a step of one token has kernels in it."""
    config, one = model.config, jnp.zeros((1,), jnp.int32)
    sizes = (2, 16, config.num_kv_heads, config.head_dim)
    kv_pages = tuple(empty_kv_pages(*sizes, config.cache_dtype) for _ in range(config.num_layers))
    ragged = {} if decodes else {"query_starts": jnp.arange(2, dtype=jnp.int32), "num_seqs": one + 1}
    batch = Batch(one, one, one, one + 1, one[None], **ragged)
    traced = jax.make_jaxpr(lambda *args: forward(args[0], config, *args[1:]))(model.params, batch, kv_pages)
    return any(equation.primitive.name == "pallas_call" for equation in equations(traced.jaxpr))


@pytest.mark.parametrize("mechanism", sorted(set(Attention) - set(ed.ATTENTION), key=str))
@pytest.mark.parametrize("name", ["attn_mechanism", "decode_attn_mechanism"])
def test_mechanisms_without_an_equivalent_are_refused_by_name(name: str, mechanism: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"{name}={mechanism}: .* supported are AUTO, RAGGED_PAGE"):
        load_with(**{name: mechanism})


@pytest.mark.parametrize(("method", "dtype"), [(Quantization.NF4, "uint8"), (Quantization.A8BIT, "int8")])
def test_weights_are_quantized_as_they_are_loaded(method: ed.EasyDeLQuantizationMethods, dtype: str) -> None:
    layer: Any = load(quantization_method=method).params.layers[0]
    assert {layer.q_proj.data.dtype.name, layer.down_proj.data.dtype.name} == {dtype}
    assert load(quantization_method=Quantization.NONE).params.layers[0].q_proj.dtype == jnp.bfloat16


@pytest.mark.usefixtures("no_type_checker")
def test_a_quantization_method_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^quantization_method='int3': must be one of .*NF4"):
        load(quantization_method="int3")


@pytest.mark.parametrize("kvdtype", [{}, {"kvdtype": jnp.bfloat16}, {"kvdtype": "int8"}], ids=str)
def test_a_cache_of_8_bits_is_one_of_int8(kvdtype: dict[str, Any]) -> None:
    config = load_with(kv_cache_quantization_method=Quantization.A8BIT, **kvdtype).config
    assert config.cache_dtype == jnp.int8


def test_what_a_cache_cannot_be_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"^kv_cache_quantization_method=.*NF4.*\.NONE and A8BIT"):
        load_with(kv_cache_quantization_method=Quantization.NF4)
    with pytest.raises(ValueError, match=r"kvdtype=float8_e4m3fn: contradicts kv_cache_quantization_method="):
        load_with(kv_cache_quantization_method=Quantization.A8BIT, kvdtype=jnp.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float8_e5m2])
def test_other_dtypes_of_the_cache_are_refused(dtype: Any) -> None:
    with pytest.raises(
        NotImplementedError, match=f"kvdtype={jnp.dtype(dtype).name}: .* bfloat16, float32, int8, float8"
    ):
        load_with(kvdtype=dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config_kwargs": {"kvdtype": "junk"}}, "kvdtype='junk': no such dtype; supported are bfloat16, "),
        ({"dtype": "junk"}, "^dtype='junk': supported are"),
        ({"param_dtype": jnp.int8}, "^param_dtype='int8': supported are"),
    ],
)
def test_a_dtype_that_is_none_is_named_as_the_caller_named_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_an_unknown_option_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"config_kwargs: use_scan_mlp=True: no such option; .*'attn_mechanism'"
    ):
        load_with(use_scan_mlp=True)
    with pytest.raises(
        ValueError, match=r"attn_mechanism='flashy': must be one of AttentionMechanisms\.AUTO"
    ):
        load_with(attn_mechanism="flashy")
    with pytest.raises(TypeError, match="no_such_parameter"):
        ed.vSurge.from_model(load(), no_such_parameter=1)


@pytest.mark.parametrize(
    ("policy", "level"),
    [
        (ed.EasyDeLGradientCheckPointers.NONE, logging.INFO),
        (ed.EasyDeLGradientCheckPointers.NOTHING_SAVEABLE, logging.WARNING),
    ],
)
def test_gradient_checkpointing_is_said_to_have_no_effect(
    policy: Any, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vsurge.easydel"):
        load_with(gradient_checkpointing=policy)
    (record,) = caplog.records
    assert record.levelno == level
    assert record.message.startswith(f"gradient_checkpointing={policy} has no effect")


@pytest.mark.parametrize(
    ("name", "value"), [("interleaved_mode", False), ("slot_clear_steps", 16), ("bytecode_decode", True)]
)
def test_engine_options_without_a_meaning_here_are_said_to_have_no_effect(
    name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = load()
    with caplog.at_level(logging.WARNING, "vsurge.easydel"):
        ed.vSurge.from_model(model, **{name: value})
    assert [record.message for record in caplog.records] == [f"{name}={value} has no effect here"]


def test_the_mesh_is_used_only_if_the_model_is_to_be_sharded(caplog: pytest.LogCaptureFixture) -> None:
    model = load(auto_shard_model=False, sharding_axis_dims=(1, 1, 1, -1, 1))
    assert list(model.mesh.devices.flat) == jax.devices()[:1]
    assert "auto_shard_model=False" in caplog.text


@pytest.mark.parametrize("auto_shard_model", [True, False])
@pytest.mark.parametrize("dims", [(1, 1, 1, 2 * len(jax.devices()), 1), (1, -1), (1, -1, 1, -1, 1)])
def test_a_mesh_that_cannot_be_is_refused_even_if_it_is_not_used(
    dims: tuple[int, ...], auto_shard_model: bool
) -> None:
    with pytest.raises(ValueError, match=rf"sharding_axis_dims={re.escape(str(dims))}: "):
        load(auto_shard_model=auto_shard_model, sharding_axis_dims=dims)


def test_axis_names_and_partition_axis_describe_the_mesh() -> None:
    names = ("data", "fsdp", "expert", "tensor", "sequence")
    partition_axis = ed.PartitionAxis(
        **dict.fromkeys(
            ("vocab_axis", "head_axis", "key_value_head_axis", "mlp_intermediate_axis"), "tensor"
        ),
        expert_axis="expert",
        sequence_axis="sequence",
        batch_axis="data",
    )
    model = load(sharding_axis_names=names, partition_axis=partition_axis)
    assert model.mesh.axis_names == names
    assert model.partition_axis == partition_axis
    with pytest.raises(ValueError, match="the mesh has the axes"):
        load(partition_axis=partition_axis)


@pytest.mark.parametrize("name", ["complete"])
def test_methods_of_easydels_engine_that_do_not_exist_yet_say_so(name: str) -> None:
    surge = ed.vSurge.from_model(load(), max_length=48)
    with pytest.raises(NotImplementedError, match=rf"^vSurge\.{name}: not supported yet"):
        getattr(surge, name)()


def test_the_type_checker_is_awake_in_this_room() -> None:
    with pytest.raises(Exception, match=r"(?i)type-?check"):
        load(revision=3)
