"""Quantized while loading, saved, loaded again; and checkpoints that others quantized."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from vsurge import demo_model_path
from vsurge.model import (
    CheckpointError,
    ConfigError,
    Model,
    Quantization,
    QuantizedMatrix,
    Qwen3Config,
    Yarn,
    checkpoint,
    load_model,
    random_model,
    save_model,
    saving,
)
from vsurge.model.config_json import config_from_json, config_to_json
from vsurge.model.params import param_specs
from vsurge.model.quantization import Method, quantize
from vsurge.model.quantized_specs import weight_bytes

from .checkpoints import CONFIG, Q_PROJ, SHAPE, SINGLE, random_tensors, write_single
from .dequantized import dequantize

METHODS: tuple[Method, ...] = ("a8bit", "nf4", "fp8")
make = jax.jit(quantize, static_argnums=1)


@pytest.fixture(scope="module")
def plain() -> Model:
    return load_model(demo_model_path())


@pytest.fixture(scope="module", params=METHODS)
def quantized(request: pytest.FixtureRequest) -> Model:
    return load_model(demo_model_path(), quantization_method=request.param)


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedMatrix)


def matrices(model: Model) -> list[QuantizedMatrix]:
    return [leaf for leaf in jax.tree.leaves(model.params, is_leaf=is_quantized) if is_quantized(leaf)]


def assert_equal(found: Any, expected: Any) -> None:
    """Trees of arrays, bit for bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def num_bytes(model: Model) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))


def test_what_is_loaded_is_what_the_loaded_would_be_quantized_to(plain: Model, quantized: Model) -> None:
    method = matrices(quantized)[0].method
    assert len(matrices(quantized)) == 7 * plain.config.num_layers

    def expected(found: Any, array: Any) -> Any:
        return make(array, method) if is_quantized(found) else array

    assert_equal(
        quantized.params, jax.tree.map(expected, quantized.params, plain.params, is_leaf=is_quantized)
    )
    assert num_bytes(quantized) == weight_bytes(plain.config, np.dtype(jnp.bfloat16), Quantization(method))
    assert quantized.config == plain.config


def test_what_is_saved_is_loaded_bit_for_bit(quantized: Model, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(saving, "MAX_FILE_BYTES", 400_000)  # so that there are several files
    method = matrices(quantized)[0].method
    folder = save_model(quantized, tmp_path / "saved")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    for asked in (None, method):
        again = load_model(folder, quantization_method=asked)
        assert_equal(again.params, quantized.params)
    assert again.config == quantized.config
    assert again.generation_defaults == quantized.generation_defaults
    assert (folder / "tokenizer.json").read_bytes() == (demo_model_path() / "tokenizer.json").read_bytes()
    other = "a8bit" if method == "nf4" else "nf4"
    with pytest.raises(ValueError, match=f"^quantization_method='{other}': .* as '{method}'; leave the opt"):
        load_model(folder, quantization_method=other)
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        save_model(quantized, folder)


def test_a_model_that_is_not_quantized_is_saved_as_the_published_ones_are(
    plain: Model, tmp_path: Path
) -> None:
    folder = save_model(plain, tmp_path)
    ours, theirs = load_file(folder / SINGLE), load_file(demo_model_path() / SINGLE)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert load_model(folder).config == plain.config


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(("name", "value"), [("model", "Qwen/Qwen3-0.6B"), ("folder", None), ("folder", 5)])
def test_what_is_no_model_or_no_folder_is_refused_by_name(
    name: str, value: Any, plain: Model, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=f"^{name}={value!r}: must be "):
        save_model(**{"model": plain, "folder": tmp_path, name: value})


@pytest.mark.parametrize("eos", [(), (3, 5)])
def test_a_shape_comes_back_from_its_config_json(eos: tuple[int, ...]) -> None:
    config = Qwen3Config(
        40, 16, 24, 2, 4, 2, 8, 99, 1e-5, 1e4, Yarn(4.0, 32, attention_factor=1.5), None, True, True, eos
    )
    for one in (config, replace(config, yarn=None, tie_word_embeddings=False)):
        raw = json.loads(json.dumps(config_to_json(one, np.dtype(np.float32))))
        assert config_from_json(raw) == one
        assert raw["torch_dtype"] == "float32"


def test_the_devices_never_hold_the_model_before_it_is_quantized(monkeypatch: Any) -> None:
    """After every eighth tensor: what was made of those before, and no more than the largest beside it."""
    specs = jax.tree.leaves(param_specs(load_model(demo_model_path()).config))
    largest = max(2 * spec.size for spec in specs)

    def held() -> int:
        gc.collect()  # of what was copied, jax on a CPU keeps views of the file until then
        alive = [array for array in jax.live_arrays() if not array.is_deleted()]
        # two arrays may be one buffer: an array and its only shard
        return sum({array.unsafe_buffer_pointer(): array.nbytes for array in alive}.values())

    before, most = held(), list[int]()

    def watched(items: Any, *_: Any, **__: Any) -> Iterator[Any]:
        for number, item in enumerate(items, start=1):
            yield item
            if number % 8 == 0 or number == len(specs):
                most.append(held() - before)

    monkeypatch.setattr(checkpoint, "progress_bar", watched)
    model = load_model(demo_model_path(), quantization_method="nf4")
    assert len(most) == -(-len(specs) // 8)
    assert max(most) <= num_bytes(model) + largest
    assert num_bytes(model) + largest < sum(2 * spec.size for spec in specs)
    assert most[-1] == num_bytes(model)


def test_random_weights_are_quantized_as_they_are_made() -> None:
    config = Qwen3Config(300, 64, 128, 2, 2, 1, 32)
    plain, found = (random_model(config, seed=3, quantization_method=m) for m in (None, "nf4"))
    assert len(matrices(found)) == 14
    for layer, expected in zip(found.params.layers, plain.params.layers, strict=True):
        assert_equal(layer.down_proj, make(expected.down_proj, "nf4"))
    assert_equal(found.params.embedding, plain.params.embedding)


def fp8_tensors(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A checkpoint as the published FP8 ones are, and the float32 numbers that it stands for."""
    rng = np.random.default_rng(seed)
    stored: dict[str, np.ndarray] = {}
    numbers: dict[str, np.ndarray] = {}
    for spec in jax.tree.leaves(param_specs(FP8_SHAPE)):
        tensor = (rng.normal(size=spec.shape) * spec.shape[-1] ** -0.5).astype(ml_dtypes.bfloat16)
        if not spec.name.endswith("_proj.weight"):
            stored[spec.name], numbers[spec.name] = tensor, tensor.astype(np.float32)
            continue
        data = (rng.normal(size=spec.shape) * 100).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        blocks = [-(-n // 128) for n in spec.shape]
        scales = (rng.uniform(1, 2, blocks) * spec.shape[-1] ** -0.5 / 100).astype(ml_dtypes.bfloat16)
        stored[spec.name], stored[spec.name + "_scale_inv"] = data, scales
        spread = np.kron(scales.astype(np.float32), np.ones((128, 128), np.float32))
        numbers[spec.name] = data.astype(np.float32) * spread[: spec.shape[0], : spec.shape[1]]
    return stored, numbers


FP8_SHAPE = Qwen3Config(40, 192, 256, 2, 4, 2, 64)
FP8_CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"],
    },
}


def test_a_published_fp8_checkpoint_is_kept_as_it_is(tmp_path: Path, cached_sequence: Callable) -> None:
    stored, numbers = fp8_tensors()
    for name in ("fp8", "plain"):
        (tmp_path / name).mkdir()
    model = load_model(write_single(tmp_path / "fp8", stored, **FP8_CONFIG), compute_dtype="float32")
    layer: Any = model.params.layers[1]
    assert layer.q_proj.method == "fp8"
    assert np.asarray(layer.q_proj.data).tobytes() == stored[Q_PROJ].tobytes()
    np.testing.assert_array_equal(
        np.asarray(layer.q_proj.scales), stored[Q_PROJ + "_scale_inv"].astype(np.float32)
    )
    assert layer.q_proj.scales.dtype == np.float32
    assert model.params.lm_head is not None
    assert model.params.embedding.dtype == model.params.lm_head.dtype == jnp.bfloat16
    assert len(matrices(model)) == 14

    shape = {k: v for k, v in FP8_CONFIG.items() if k != "quantization_config"}
    same = load_model(write_single(tmp_path / "plain", numbers, torch_dtype="float32", **shape))
    tokens = [3, 1, 4, 1, 5, 9, 2]
    found, expected = (cached_sequence(m).prefill(tokens, 8) for m in (model, same))
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < 1e-5
    again = load_model(save_model(model, tmp_path / "saved"))
    assert_equal(again.params, model.params)


def test_modules_that_a_checkpoint_names_stay_as_they_are(tmp_path: Path) -> None:
    stored, numbers = fp8_tensors()
    for name in list(stored):
        if "layers.0.mlp." in name and name.endswith("_scale_inv"):
            del stored[name]
            weight = name.removesuffix("_scale_inv")
            stored[weight] = numbers[weight].astype(ml_dtypes.bfloat16)
    section = FP8_CONFIG["quantization_config"] | {"modules_to_not_convert": ["model.layers.0.mlp"]}
    model = load_model(write_single(tmp_path, stored, **(FP8_CONFIG | {"quantization_config": section})))
    first, second = model.params.layers
    assert first.up_proj.dtype == jnp.bfloat16
    assert is_quantized(first.q_proj)
    assert is_quantized(second.up_proj)
    assert saving.quantization_of(model) == Quantization(
        "fp8", tuple(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))
    )
    assert_equal(load_model(save_model(model, tmp_path / "saved")).params, model.params)


SECTION = FP8_CONFIG["quantization_config"]
REFUSED: dict[str, tuple[Any, str]] = {
    "another method": ({"quant_method": "gptq"}, r"quant_method='gptq': supported are 'fp8' and 'vsurge'"),
    "one scale per tensor": (
        {"quant_method": "fp8"},
        r"weight_block_size=None: supported is \[128, 128\]",
    ),
    "blocks of another size": (SECTION | {"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\]"),
    "another float8": (SECTION | {"fmt": "e5m2"}, r"fmt='e5m2': supported is 'e4m3'"),
    "static activations": (SECTION | {"activation_scheme": "static"}, r"activation_scheme='static'"),
    "an unknown option": (SECTION | {"zero_point": True}, r"not supported: \['zero_point'\]"),
    "names that are none": (SECTION | {"modules_to_not_convert": [3]}, r"modules_to_not_convert=\[3\]"),
    "an unknown form": ({"quant_method": "vsurge", "format": "int3"}, r"format='int3': supported are"),
    "nf4 of another block": ({"quant_method": "vsurge", "format": "nf4", "block_size": 32}, "block_size=32"),
    "no object": (8, r"quantization_config=8: must be an object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_section_that_is_not_supported_is_refused_by_name(case: str) -> None:
    section, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        config_from_json(CONFIG | {"quantization_config": section})


DAMAGED: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "scales that are missing": (lambda t: t.pop(Q_PROJ + "_scale_inv"), "_scale_inv' is missing"),
    "scales of another shape": (
        lambda t: t.update({Q_PROJ + "_scale_inv": np.ones((1, 1), np.float32)}),
        r"shape \(1, 1\), config.json expects \(2, 2\)",
    ),
    "weights in bfloat16": (
        lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(ml_dtypes.bfloat16)}),
        "dtype bfloat16, config.json expects float8_e4m3fn",
    ),
    "a norm in int8": (
        lambda t: t.update({"model.norm.weight": np.ones(192, np.int8)}),
        "dtype int8, config.json expects bfloat16 or float32 or float16",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_quantized_checkpoint_is_refused_by_tensor(case: str, tmp_path: Path) -> None:
    edit, message = DAMAGED[case]
    tensors = fp8_tensors()[0]
    edit(tensors)
    write_single(tmp_path, tensors, **FP8_CONFIG)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_quantized_tensors_without_a_section_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[Q_PROJ] = np.ones((32, 16), np.int8)
    write_single(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"has dtype int8, config\.json expects bfloat16 or"):
        load_model(tmp_path)


@pytest.mark.usefixtures("no_type_checker")
def test_a_method_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    write_single(tmp_path)
    with pytest.raises(ValueError, match=r"^quantization_method='int3': must be None or one of \['a8bit', "):
        load_model(tmp_path, quantization_method="int3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"q_proj.weight \(32, 16\): rows of 16 numbers, nf4 needs"):
        load_model(tmp_path, quantization_method="nf4")
    with pytest.raises(ConfigError, match="rows of 16 numbers"):
        random_model(SHAPE, seed=0, quantization_method="nf4")


def test_weights_are_quantized_from_what_is_stored_and_not_from_what_it_is_rounded_to(tmp_path: Path) -> None:
    tensors = random_tensors(np.float32)
    write_single(tmp_path, tensors)
    found = load_model(tmp_path, dtype="bfloat16", quantization_method="a8bit").params
    assert found.embedding.dtype == jnp.bfloat16
    expected = make(jnp.asarray(tensors[Q_PROJ]), "a8bit")
    assert_equal(found.layers[1].q_proj, expected)
    rounded = make(jnp.asarray(tensors[Q_PROJ]).astype(jnp.bfloat16), "a8bit")
    assert (np.asarray(rounded.scales) != np.asarray(expected.scales)).any()
    assert dequantize(expected, np.float32).shape == (32, 16)
