"""Experts in fewer bits: made while loading, saved, read as published, and multiplied with."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vsurge.kernels.tuning import compile_for
from vsurge.model import (
    Experts,
    LayerParams,
    Model,
    Quantization,
    QuantizedMatrix,
    Qwen3Config,
    load_model,
    published_config,
    random_model,
    save_model,
)
from vsurge.model.config_json import config_from_json, config_to_json
from vsurge.model.moe import _by_ragged_dot, _by_tiles, experts_mlp
from vsurge.model.params import param_specs
from vsurge.model.quantization import METHODS, Method, quantize, untransposed
from vsurge.model.quantized_specs import quantized_specs, weight_bytes

from .checkpoints import SINGLE
from .dequantized import dequantize

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)
EXPERTS = Experts(4, 2, 192, normalize_weights=True, dense_layers=(0,))
CONFIG = Qwen3Config(40, 256, 128, 2, 4, 2, 64, dtype=FLOAT32, experts=EXPERTS)
MATRICES = ("gate_proj", "up_proj", "down_proj")
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def plain() -> Model:
    return random_model(CONFIG, seed=0, dtype=np.float32)


@pytest.fixture(scope="module")
def folder(plain: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(plain, tmp_path_factory.mktemp("plain") / "saved")


def bits(model: Model) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model.params)]


def expert(weights: Any, number: int) -> Any:
    """One expert's matrix, [out, in]."""
    if isinstance(weights, QuantizedMatrix):
        return untransposed(jax.tree.map(lambda part: part[number], weights))
    return weights[number].T


def dequantized(layer: LayerParams) -> LayerParams:
    """A layer of the numbers that a quantized one stands for."""
    changes = {}
    for name in MATRICES:
        weights = getattr(layer, name)
        of_experts = [dequantize(expert(weights, e), np.float32).T for e in range(weights.data.shape[0])]
        changes[name] = jnp.stack(of_experts)
    return dataclasses.replace(layer, **changes)


def test_experts_are_saved_as_they_are_published(plain: Model, folder: Path) -> None:
    again = load_model(folder)
    assert again.config == plain.config
    assert bits(again) == bits(plain)
    stored = load_file(folder / SINGLE)
    assert stored["model.layers.1.mlp.experts.3.down_proj.weight"].shape == (256, 192)
    assert stored["model.layers.1.mlp.gate.weight"].shape == (4, 256)
    assert stored.keys() == {
        name for spec in jax.tree.leaves(param_specs(CONFIG)) for name in spec.stored_names
    }
    raw = config_to_json(published_config("30B-A3B"), BFLOAT16)
    assert config_from_json(json.loads(json.dumps(raw))) == published_config("30B-A3B")


@each_method
def test_each_expert_is_quantized_as_a_matrix_of_its_own(plain: Model, folder: Path, method: Method) -> None:
    found = load_model(folder, quantization_method=method)
    for name in MATRICES:
        ours, theirs = (getattr(model.params.layers[1], name) for model in (found, plain))
        for number in range(4):
            expected = jax.jit(quantize, static_argnums=1)(expert(theirs, number), method)
            got = expert(ours, number)
            assert got.method == method
            np.testing.assert_array_equal(got.data, expected.data)
            np.testing.assert_array_equal(got.scales, expected.scales)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(found.params))
    assert total == weight_bytes(CONFIG, FLOAT32, Quantization(method))


@each_method
def test_quantized_experts_are_saved_and_read_bit_for_bit(
    folder: Path, tmp_path: Path, method: Method
) -> None:
    model = load_model(folder, quantization_method=method)
    saved = save_model(model, tmp_path / "saved")
    assert bits(load_model(saved)) == bits(model)
    stored = load_file(saved / SINGLE) if method != "fp8" else {}  # NumPy has no float8
    if method == "a8bit":
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        assert (stored[name].dtype, stored[name].shape) == (np.int8, (256, 192))
        assert stored[name + "_scale"].shape == (256,)


def test_a_published_fp8_mixture_has_the_tensors_that_are_looked_for() -> None:
    """Those of Qwen3-30B-A3B-FP8: a scale per 128 x 128 of each expert's matrices, the router as it is."""
    config = published_config("30B-A3B")
    found = {
        name: (spec.stored_shape, spec.dtype)
        for spec in jax.tree.leaves(quantized_specs(config, Quantization("fp8", ("lm_head",))))
        for name in spec.stored_names
    }
    prefix = "model.layers.47.mlp."
    assert found[prefix + "experts.127.gate_proj.weight"][0] == (768, 2048)
    assert found[prefix + "experts.127.gate_proj.weight"][1] == jnp.float8_e4m3fn
    assert found[prefix + "experts.127.gate_proj.weight_scale_inv"] == ((6, 16), FLOAT32)
    assert found[prefix + "experts.127.down_proj.weight_scale_inv"] == ((16, 6), FLOAT32)
    assert found[prefix + "gate.weight"] == ((128, 2048), None)
    assert prefix + "gate.weight_scale_inv" not in found


@each_method
@pytest.mark.parametrize("num_tokens", [1, 50])
def test_the_output_is_that_of_the_numbers_they_stand_for(
    plain: Model, method: Method, num_tokens: int, row_errors: Any
) -> None:
    layer = random_model(CONFIG, seed=0, dtype=np.float32, quantization_method=method).params.layers[1]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(num_tokens, 256)), jnp.float32)
    run = jax.jit(experts_mlp, static_argnames="config")
    found = np.asarray(run(layer, CONFIG, x))
    assert row_errors(found, np.asarray(run(dequantized(layer), CONFIG, x))).max() <= 1e-5
    exact = np.asarray(run(plain.params.layers[1], CONFIG, x))
    assert 1e-3 < row_errors(found, exact).max() < (0.3 if method == "nf4" else 0.1)


def test_the_kernel_of_a_tpu_is_given_the_scales_of_each_rows_expert(row_errors: Any) -> None:
    layer = random_model(CONFIG, seed=0, dtype=np.float32, quantization_method="a8bit").params.layers[1]
    weights = [getattr(layer, name) for name in MATRICES]
    sizes = jnp.asarray([3, 0, 5, 1], jnp.int32)  # and a row of nobody
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(10, 256)), jnp.float32)
    by_kernel = np.asarray(jax.jit(_by_ragged_dot, static_argnums=0)(CONFIG, rows, sizes, *weights))
    by_tiles = np.asarray(jax.jit(_by_tiles, static_argnums=(0, 1))(CONFIG, 8, rows, sizes, *weights))
    assert row_errors(by_kernel[:9], by_tiles[:9]).max() <= 1e-5


@pytest.mark.parametrize(("chip", "kernels"), [("v6e", 3), ("7x", 0)])
def test_a_tpu_reads_int8_experts_where_they_lie(chip: str, kernels: int) -> None:
    """By its kernel, or where that would make float32 of all of them, one expert at a time."""
    config = dataclasses.replace(published_config("30B-A3B"), num_layers=1)
    specs = quantized_specs(config, Quantization("a8bit")).layers[0]
    layer = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype or config.dtype), specs)
    x = jax.ShapeDtypeStruct((16, config.hidden_size), np.float32)
    compiled = compile_for(chip, lambda layer, x: experts_mlp(layer, config, x), layer, x)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    assert len(re.findall(r"%ragged-dot-none\S* = f32", text)) == kernels
    assert memory.temp_size_in_bytes < 8 << 20  # all experts of one matrix are 192 MiB in int8
