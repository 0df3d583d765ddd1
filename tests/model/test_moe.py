"""Qwen3-MoE: the router and its experts against plain loops, and whole models against transformers."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from vsurge.kernels.tuning import compile_for
from vsurge.model import (
    CheckpointError,
    ConfigError,
    Experts,
    LayerParams,
    Qwen3Config,
    load_model,
    num_active_parameters,
    num_parameters,
    published_config,
    random_model,
    stacked,
)
from vsurge.model.moe import _turns as turns_of
from vsurge.model.moe import experts_mlp, route
from vsurge.model.params import param_specs

from ..devices import printed_by
from .checkpoints import SINGLE, edit_tensors
from .jaxprs import equations

FLOAT32 = np.dtype(np.float32)
EXPERTS = Experts(8, 2, 24, normalize_weights=True)
CONFIG = Qwen3Config(40, 32, 48, 1, 4, 2, 16, dtype=FLOAT32, experts=EXPERTS)
MATRICES = ("router", "gate_proj", "up_proj", "down_proj")
run = jax.jit(experts_mlp, static_argnames=("config", "layout"))


def make_layer(config: Qwen3Config = CONFIG, dtype: Any = np.float32) -> LayerParams:
    """A layer whose experts keep the size of their input and whose router is sure of its choice."""
    layer = random_model(config, seed=0, dtype=dtype).params.layers[0]
    return dataclasses.replace(layer, **{name: getattr(layer, name) * 10 for name in MATRICES})


def make_tokens(num_tokens: int, hidden: int = 32) -> np.ndarray:
    return np.random.default_rng(num_tokens).normal(size=(num_tokens, hidden)).astype(np.float32)


def by_loops(layer: LayerParams, config: Qwen3Config, x: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """The outputs in float64, a token and an expert at a time, and the experts of each token."""
    assert config.experts is not None
    router, gate, up, down = (np.asarray(getattr(layer, name), np.float64) for name in MATRICES)
    outputs, taken = np.zeros(x.shape), []
    for token, row in enumerate(x.astype(np.float64)):
        scores = np.exp(router @ row)
        scores /= scores.sum()
        experts = np.argsort(-scores)[: config.experts.experts_per_token]
        share = scores[experts].sum() if config.experts.normalize_weights else 1.0
        for expert in experts:
            a = row @ gate[expert]
            inner = a / (1 + np.exp(-a)) * (row @ up[expert])
            outputs[token] += scores[expert] / share * (inner @ down[expert])
        taken.append(experts.tolist())
    return outputs, taken


@pytest.mark.parametrize(("num_tokens", "normalize"), [(1, True), (5, False), (200, True)])  # 200: many tiles
def test_experts_equal_plain_loops_over_tokens(num_tokens, normalize, row_errors):
    experts = dataclasses.replace(EXPERTS, normalize_weights=normalize)
    config = dataclasses.replace(CONFIG, experts=experts)
    layer, x = make_layer(config), make_tokens(num_tokens)
    assert layer.router is not None
    expected, taken = by_loops(layer, config, x)
    assert row_errors(np.asarray(run(layer, config, jnp.asarray(x))), expected).max() <= 1e-5
    weights, chosen = route(config, jnp.asarray(x), layer.router)
    assert np.asarray(chosen).tolist() == taken
    assert np.allclose(np.asarray(weights).sum(axis=1), 1.0, rtol=1e-6) == normalize


def test_an_expert_that_no_token_takes_is_not_computed(row_errors):
    """Its weights are NaN, and NaN times zero is NaN."""
    layer, x = make_layer(), make_tokens(3)
    expected, taken = by_loops(layer, CONFIG, x)
    idle = sorted(set(range(8)) - {expert for experts in taken for expert in experts})
    assert idle
    poisoned = {name: getattr(layer, name).at[np.array(idle)].set(jnp.nan) for name in MATRICES[1:]}
    found = run(dataclasses.replace(layer, **poisoned), CONFIG, jnp.asarray(x))
    assert row_errors(np.asarray(found), expected).max() <= 1e-5


def test_a_token_that_is_nan_changes_no_other(row_errors):
    """Such as padding may be."""
    layer, x = make_layer(), make_tokens(20)
    expected, _ = by_loops(layer, CONFIG, x)
    found = np.asarray(run(layer, CONFIG, jnp.asarray(x).at[7].set(jnp.nan)))
    kept = np.arange(20) != 7
    assert row_errors(found[kept], expected[kept]).max() <= 1e-5


def products(num_tokens: int, dtype: str) -> tuple[list[Any], list[Any]]:
    """The products of a layer with its experts, in the loop and on a TPU."""
    config = dataclasses.replace(CONFIG, dtype=np.dtype(jnp.dtype(dtype)))
    layer = jax.eval_shape(lambda: make_layer(config, dtype))
    x = jax.ShapeDtypeStruct((num_tokens, 32), np.float32)
    traced = jax.make_jaxpr(experts_mlp, static_argnums=1)(layer, config, x)
    found = list(equations(traced.jaxpr))
    router = (32, 8)
    dots = [e for e in found if e.primitive.name == "dot_general" and e.invars[1].aval.shape != router[::-1]]
    return dots, [e for e in found if e.primitive.name == "ragged_dot_general"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_product_is_of_one_expert_and_a_tile_of_its_rows(dtype):
    for num_tokens, tile in ((1, 8), (16, 8), (100, 32)):
        dots, ragged = products(num_tokens, dtype)
        assert [tuple(v.aval.shape for v in dot.invars) for dot in dots] == [
            ((tile, 32), (32, 24)),
            ((tile, 32), (32, 24)),
            ((tile, 24), (24, 32)),
        ]
        assert [dot.invars[0].aval.shape[0] for dot in ragged] == [2 * num_tokens] * 3
        precision = jax.lax.Precision.HIGHEST if dtype == "float32" else jax.lax.Precision.DEFAULT
        for product in dots + ragged:
            assert {v.aval.dtype for v in product.invars[:2]} == {np.dtype(jnp.dtype(dtype))}
            assert product.outvars[0].aval.dtype == np.float32
            assert set(product.params["precision"]) == {precision}


def test_an_expert_takes_as_many_turns_as_its_rows_fill_tiles():
    sizes = jnp.asarray([0, 1, 8, 9, 0, 16], jnp.int32)
    assert turns_of(sizes, 8).tolist() == [0, 1, 1, 2, 0, 2]


def test_on_a_cpu_bfloat16_experts_are_not_all_converted_to_float32():
    config = dataclasses.replace(
        CONFIG, dtype=np.dtype(jnp.bfloat16), experts=Experts(64, 2, 128), hidden_size=256
    )
    layer = jax.eval_shape(lambda: random_model(config, seed=0).params.layers[0])
    compiled = run.lower(layer, config, jax.ShapeDtypeStruct((4, 256), np.float32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < layer.gate_proj.size  # half of one of the three, in bytes


def test_a_tpu_reads_the_experts_where_they_lie():
    """Compiled for v6e at the shape of Qwen3-30B-A3B: three products by kernels, and no copy of weights."""
    config = dataclasses.replace(published_config("30B-A3B"), num_layers=1)
    specs = param_specs(config).layers[0]
    layer = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, config.dtype), specs)
    x = jax.ShapeDtypeStruct((16, config.hidden_size), np.float32)
    compiled = compile_for("v6e", lambda layer, x: experts_mlp(layer, config, x), layer, x)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    assert len(re.findall(r"%ragged-dot-none\S* = f32", text)) == 3
    assert memory.temp_size_in_bytes < 1 << 20  # one expert's matrix is 3 MiB, all of them 384


def test_experts_on_many_devices_equal_those_on_one():
    results = printed_by("tests.model.experts_on_eight")
    assert results["ep=8"]["shard"] == [2, 32, 24]
    assert results["ep=2, tp=2"]["shard"] == [8, 32, 12]
    assert results["tp=4"]["shard"] == [16, 32, 6]
    assert results["tp=8 over the experts"]["shard"] == [2, 32, 24]
    for name, result in results.items():
        assert result["error"] <= 1e-6, name
        if "fsdp" not in name:  # which gathers the weights
            assert result["sent"] == [["all-reduce", result["tokens"] * 32, 1]], name


PARITY: dict[str, dict[str, Any]] = {
    "normalized": {},
    "not normalized, a layer dense, tied, biased": {
        "norm_topk_prob": False,
        "mlp_only_layers": [0],
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
}


@pytest.mark.parametrize("case", PARITY)
def test_logits_equal_those_of_transformers(case, save_qwen3, cached_sequence, torch_logits, row_errors):
    changes = PARITY[case]
    folder = save_qwen3(experts=True, **changes)
    model = load_model(folder)
    assert model.config.experts is not None
    assert model.config.experts.dense_layers == ((0,) if "mlp_only_layers" in changes else ())
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 40).tolist()
    expected = torch_logits(folder, prompt)
    sequence = cached_sequence(model)
    found = np.concatenate([sequence.prefill(chunk, 24) for chunk in (prompt[:21], prompt[21:])])
    assert row_errors(found, expected).max() <= 1e-4


def test_bfloat16_experts_are_as_close_to_float32_as_in_transformers(
    save_qwen3, cached_sequence, torch_logits, row_errors
):
    """Where a token takes every expert: a choice that rounding turns would say nothing of the products."""
    folder = save_qwen3(experts=True, dtype=torch.bfloat16, hidden_size=128, num_experts_per_tok=8)
    model = load_model(folder)
    assert model.params.layers[0].gate_proj.dtype == jnp.bfloat16
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 120).tolist()
    exact = torch_logits(folder, prompt)
    ours = row_errors(cached_sequence(model, 128).prefill(prompt, 120), exact)
    theirs = row_errors(torch_logits(folder, prompt, torch.bfloat16), exact)
    assert np.sqrt(np.mean(ours**2)) <= np.sqrt(np.mean(theirs**2))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_every_expert_is_stacked_where_it_belongs(dtype, save_qwen3):
    folder = save_qwen3(experts=True, max_shard_size="100KB")
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    model = load_model(folder, dtype=dtype)
    for spec, array in zip(
        jax.tree.leaves(param_specs(model.config)), jax.tree.leaves(model.params), strict=True
    ):
        tensors = [stored.pop(name) for name in spec.stored_names]
        expected = tensors[0] if spec.parts is None else np.stack([tensor.T for tensor in tensors])
        np.testing.assert_array_equal(np.asarray(array), expected.astype(array.dtype), err_msg=spec.name)
    assert not stored


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(EXPERT), rf"{EXPERT}.* is missing, .*\(24, 64\)"),
        (
            lambda tensors: tensors.update({EXPERT: np.zeros((64, 24), np.float32)}),
            rf"{EXPERT}.*shape \(64, 24\).*expects \(24, 64\)",
        ),
        (
            lambda tensors: tensors.update({EXPERT.replace(".5.", ".8."): tensors[EXPERT].copy()}),
            r"experts\.8\.up_proj.*not part of the model",
        ),
    ],
)
def test_an_expert_that_is_missing_or_misshapen_is_named(edit, message, save_qwen3):
    folder = save_qwen3(experts=True)
    edit_tensors(folder / SINGLE, edit)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_load_that_fails_among_the_experts_leaves_nothing(save_qwen3, monkeypatch):
    folder = save_qwen3(experts=True)
    before = len(jax.live_arrays())
    put, calls = stacked._put, []

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return put(*arguments)

    monkeypatch.setattr(stacked, "_put", fail)
    with pytest.raises(KeyboardInterrupt) as caught:  # the traceback is kept here
        load_model(folder)
    assert caught
    assert len(jax.live_arrays()) <= before


def test_active_parameters_are_those_of_the_experts_that_a_token_takes():
    config = dataclasses.replace(CONFIG, num_layers=3, experts=Experts(8, 2, 24, dense_layers=(1,)))
    per_expert = 3 * 32 * 24
    assert num_parameters(config) - num_active_parameters(config) == 2 * 6 * per_expert
    dense = dataclasses.replace(config, experts=None)
    assert num_active_parameters(dense) == num_parameters(dense)


def test_experts_that_cannot_be_are_refused():
    for changes, message in (
        ({"num_experts": 0}, "num_experts=0"),
        ({"experts_per_token": 9}, "experts_per_token=9: must be at most num_experts=8"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(EXPERTS, **changes)
    with pytest.raises(ConfigError, match=r"dense_layers=\(1,\): must be among the 1 layers"):
        dataclasses.replace(CONFIG, experts=Experts(8, 2, 24, dense_layers=(1,)))
    dense = random_model(dataclasses.replace(CONFIG, experts=None), seed=0)
    with pytest.raises(ValueError, match="no experts"):
        experts_mlp(dense.params.layers[0], CONFIG, jnp.zeros((2, 32)))
