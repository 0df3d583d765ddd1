"""Matrices in fewer bits against NumPy, and products with them against float64."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vsurge.model import Quantization, QuantizedMatrix, Qwen3Config
from vsurge.model.linear import _fp8_scaled_rows, linear
from vsurge.model.params import TensorSpec, param_specs
from vsurge.model.quantization import NF4_LEVELS, Method, quantize
from vsurge.model.quantized_specs import parts_of, quantized_specs, weight_bytes

from .dequantized import dequantize

METHODS: tuple[Method, ...] = ("a8bit", "nf4", "fp8")
CONFIG = Qwen3Config(40, 128, 192, 1, 2, 1, 64)
make = jax.jit(quantize, static_argnums=1)
multiply = jax.jit(linear, static_argnums=0)
back = jax.jit(dequantize, static_argnums=1)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_levels_of_nf4_are_those_of_the_paper_s_formula() -> None:
    """QLoRA's code for equation 4: quantiles of evenly spaced probabilities from 1 - (1/30 + 1/32) / 2 on."""
    most = 1 - (1 / 30 + 1 / 32) / 2
    positive = [NormalDist().inv_cdf(p) for p in np.linspace(most, 0.5, 9)[:-1]]
    negative = [-NormalDist().inv_cdf(p) for p in np.linspace(most, 0.5, 8)[:-1]]
    levels = np.sort([*negative, 0.0, *positive]) / max(positive)
    np.testing.assert_allclose(NF4_LEVELS, levels, atol=2e-7)


def test_a8bit_is_within_half_a_step_of_each_row() -> None:
    matrix = normal(70, 90) * np.exp(normal(70, 1, seed=1))
    quantized = make(jnp.asarray(matrix), "a8bit")
    assert (quantized.data.dtype, quantized.data.shape, quantized.scales.shape) == (np.int8, (70, 90), (70,))
    step = np.abs(matrix).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(np.asarray(quantized.scales)[:, None], step, rtol=1e-6)
    assert (np.abs(np.asarray(back(quantized, np.float32)) - matrix) <= step * 0.5001).all()


def test_nf4_takes_the_nearest_level_of_each_block_of_64() -> None:
    matrix = normal(48, 192) * np.exp(normal(48, 1, seed=1))
    quantized = make(jnp.asarray(matrix), "nf4")
    assert quantized.shape == (48, 192)
    assert (quantized.data.dtype, quantized.data.shape) == (np.uint8, (96, 48))
    assert quantized.scales.shape == (3, 48)
    blocks = matrix.reshape(48, 3, 64)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    levels = np.array(NF4_LEVELS)
    nearest = levels[np.abs((blocks / largest)[..., None] - levels).argmin(-1)] * largest
    np.testing.assert_allclose(np.asarray(back(quantized, np.float32)), nearest.reshape(48, 192), rtol=1e-6)
    # where the codes lie is a format that files are written in
    codes = np.abs((blocks / largest)[..., None] - levels).argmin(-1)
    low, high = codes[:, :, :32], codes[:, :, 32:]
    np.testing.assert_array_equal(np.asarray(quantized.data), (low + 16 * high).reshape(48, 96).T)


@pytest.mark.parametrize("shape", [(256, 384), (130, 200)])
def test_fp8_has_a_scale_per_block_of_128_by_128(shape: tuple[int, int]) -> None:
    matrix = normal(*shape) * np.exp(normal(shape[0], 1, seed=1))
    quantized = make(jnp.asarray(matrix), "fp8")
    found = np.asarray(back(quantized, np.float32))
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            block = matrix[row : row + 128, column : column + 128]
            scale = np.asarray(quantized.scales)[row // 128, column // 128]
            assert scale == pytest.approx(np.abs(block).max() / 448, rel=1e-6)
            expected = (block * (1 / scale)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
            ours = found[row : row + 128, column : column + 128]
            wrong = ours != expected.astype(np.float32) * scale
            assert wrong.mean() < 1e-3  # a last bit of the factor may decide a tie
            assert (np.abs(ours - block) <= np.maximum(np.abs(block) / 16, scale * 2.0**-10) * 1.001).all()


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros_and_what_is_not_finite_shows(method: Method) -> None:
    matrix = normal(256, 256)
    matrix[:128] = 0
    matrix[200, 130] = np.inf
    found = np.asarray(back(make(jnp.asarray(matrix), method), np.float32))
    assert (found[:128] == 0).all()
    assert np.isnan(found[200, 130])
    assert np.isfinite(found[128:, :128]).all() == (method != "a8bit")


@pytest.mark.parametrize("method", METHODS)
def test_matrices_in_a_stack_are_quantized_each_by_itself(method: Method) -> None:
    stack = normal(3, 128, 64)
    whole = make(jnp.asarray(stack), method)
    assert whole.shape == (3, 128, 64)
    found = np.asarray(back(whole, np.float32))
    for index in range(3):
        one = make(jnp.asarray(stack[index]), method)
        np.testing.assert_array_equal(np.asarray(whole.data[index]), np.asarray(one.data))
        np.testing.assert_array_equal(np.asarray(whole.scales[index]), np.asarray(one.scales))
        np.testing.assert_array_equal(found[index], np.asarray(back(one, np.float32)))


def relative_error(found: Any, expected: np.ndarray) -> float:
    found = np.asarray(found, np.float64)
    return float((np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "dtype", "tolerance"), [(5, np.float32, 1e-5), (1, jnp.bfloat16, 8e-3)])
def test_a_product_is_that_with_the_matrix_stood_for(
    method: Method, rows: int, dtype: Any, tolerance: float
) -> None:
    config = replace(CONFIG, dtype=np.dtype(dtype), int8_activations=False)
    x, bias = normal(rows, 192), normal(100, seed=2)
    weight = make(jnp.asarray(normal(100, 192, seed=1)), method)
    stood_for = np.asarray(back(weight, np.float32), np.float64)
    found = multiply(config, jnp.asarray(x), weight, jnp.asarray(bias))
    assert found.dtype == np.float32
    assert relative_error(found, x.astype(np.float64) @ stood_for.T + bias) < tolerance


def test_int8_activations_are_exact_but_for_their_own_rounding() -> None:
    x = normal(5, 192)
    weight = make(jnp.asarray(normal(100, 192, seed=1)), "a8bit")
    stood_for = np.asarray(back(weight, np.float32), np.float64)
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    rounded = np.round(x / step) * step
    found = multiply(replace(CONFIG, int8_activations=True), jnp.asarray(x), weight)
    assert relative_error(found, rounded.astype(np.float64) @ stood_for.T) < 1e-5
    assert 1e-3 < relative_error(found, x.astype(np.float64) @ stood_for.T) < 2e-2


def test_on_a_cpu_bfloat16_products_of_a8bit_have_int8_activations_unless_told_otherwise() -> None:
    x = jnp.asarray(normal(4, 192))
    weight = make(jnp.asarray(normal(100, 192, seed=1)), "a8bit")

    def product(**changes: Any) -> Any:
        return multiply(replace(CONFIG, **changes), x, weight)

    assert (product() == product(int8_activations=True)).all()
    assert (product() != product(int8_activations=False)).any()
    float32 = replace(CONFIG, dtype=np.dtype(np.float32))
    assert "preferred_element_type=int32" not in str(
        jax.make_jaxpr(linear, static_argnums=0)(float32, x, weight)
    )


def test_the_projections_are_quantized_and_nothing_else() -> None:
    for index, (spec, parts) in enumerate(
        zip(
            jax.tree.leaves(param_specs(CONFIG)),
            jax.tree.leaves(
                quantized_specs(CONFIG, Quantization("a8bit")),
                is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix),
            ),
            strict=True,
        )
    ):
        is_projection = "_proj.weight" in spec.name
        assert isinstance(parts, QuantizedMatrix) == is_projection, (index, spec.name)


@pytest.mark.parametrize("method", METHODS)
def test_scales_are_split_like_the_numbers_that_they_belong_to(method: Method) -> None:
    """A logical axis of the matrix is the same one of data and of scales, and of a size that goes with it."""
    spec = TensorSpec("o_proj.weight", (512, 1024), ("hidden", "q_heads"))
    parts: Any = parts_of(spec, method)
    sizes = dict(zip(spec.axes, spec.shape, strict=True))
    for part in (parts.data, parts.scales):
        assert len(part.axes) == len(part.shape)
        for axis, size in zip(part.axes, part.shape, strict=True):
            assert sizes[axis] % size == 0
    assert (
        dict(zip(parts.scales.axes, parts.scales.shape, strict=True))
        == {
            "a8bit": {"hidden": 512},
            "nf4": {"hidden": 512, "q_heads": 16},
            "fp8": {"hidden": 4, "q_heads": 8},
        }[method]
    )
    shapes = jax.eval_shape(lambda: quantize(jnp.zeros(spec.shape), method))
    assert (shapes.data.shape, shapes.scales.shape) == (parts.data.shape, parts.scales.shape)
    assert (shapes.data.dtype, shapes.scales.dtype) == (parts.data.dtype, parts.scales.dtype)


def test_bytes_are_what_the_bits_say_and_the_scales() -> None:
    hidden, inter, heads, layers, vocab = 1024, 3072, 2048, 28, 151936
    config = Qwen3Config(vocab, hidden, inter, layers, 16, 8, 128, tie_word_embeddings=True)
    # (out, in) of q, k, v, o, gate, up, down
    matrices = [(heads, hidden), (1024, hidden), (1024, hidden), (hidden, heads)]
    matrices += [(inter, hidden), (inter, hidden), (hidden, inter)]
    rest = 2 * (vocab * hidden + layers * (2 * hidden + 2 * 128) + hidden)
    numbers = layers * sum(a * b for a, b in matrices)
    expected = {
        "a8bit": numbers + 4 * layers * sum(a for a, _ in matrices),
        "nf4": numbers // 2 + 4 * numbers // 64,
        "fp8": numbers + 4 * numbers // 128**2,
    }
    for method in METHODS:
        num_bytes = weight_bytes(config, np.dtype(jnp.bfloat16), Quantization(method))
        assert num_bytes == rest + expected[method]
    assert weight_bytes(config, np.dtype(jnp.bfloat16)) == rest + 2 * numbers


def test_fp8_may_scale_the_other_operand_instead() -> None:
    """What a TPU runs, called here."""
    config = replace(CONFIG, dtype=np.dtype(np.float32))
    x = normal(5, 200)
    weight = make(jnp.asarray(normal(256, 200, seed=1)), "fp8")
    found = jax.jit(_fp8_scaled_rows, static_argnums=(0, 1))(config, config.dtype, jnp.asarray(x), weight)
    stood_for = np.asarray(back(weight, np.float32), np.float64)
    assert relative_error(found, x.astype(np.float64) @ stood_for.T) < 1e-5


@pytest.mark.usefixtures("no_type_checker")
def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^int8_activations='yes': must be True, False or None"):
        replace(CONFIG, int8_activations="yes")
    with pytest.raises(ValueError, match=r"^matrix: rows of 96 numbers, nf4 needs a multiple of 64"):
        quantize(jnp.zeros((4, 96)), "nf4")
    with pytest.raises(ValueError, match=r"q_proj.weight \(128, 96\): rows of 96 numbers, nf4 needs"):
        quantized_specs(replace(CONFIG, hidden_size=96), Quantization("nf4"))


def test_shapes_of_quantized_weights_are_checked() -> None:
    with pytest.raises(Exception, match="weight"):
        linear(CONFIG, jnp.zeros((2, 8)), "a8bit")  # pyright: ignore[reportArgumentType]
