"""How the forward pass is put to XLA: no slow or coarse product, no copy of the cache, shapes checked."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from vsurge.kernels import KVPages, empty_kv_pages
from vsurge.model import Batch, Model, Qwen3Config, forward, random_model
from vsurge.model.qwen3 import linear, logits, rms_norm

from .jaxprs import equations

CONFIG = Qwen3Config(40, 32, 48, 2, 4, 2, 16)
NUM_PAGES, PAGE_SIZE = 4, 8


def make_batch(num_tokens: int, num_seqs: int, *, decode: bool, logit_rows: int | None = None) -> Batch:
    def integers(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.int32)

    return Batch(
        token_ids=integers(num_tokens),
        positions=integers(num_tokens),
        slots=integers(num_tokens),
        kv_lens=integers(num_seqs),
        page_table=integers(num_seqs, NUM_PAGES),
        query_starts=None if decode else integers(num_seqs + 1),
        num_seqs=None if decode else integers(1),
        logit_rows=None if logit_rows is None else integers(logit_rows),
    )


def make_cache(config: Qwen3Config) -> tuple[KVPages, ...]:
    return tuple(
        empty_kv_pages(NUM_PAGES, PAGE_SIZE, config.num_kv_heads, config.head_dim, config.cache_dtype)
        for _ in range(config.num_layers)
    )


def weight_products(model: Model, batch: Batch) -> list[Any]:
    """The products of activations and weights: those without a batch dimension."""
    traced = jax.make_jaxpr(forward, static_argnums=1)(
        model.params, model.config, batch, make_cache(model.config)
    )
    dots = [e for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
    products = [e for e in dots if not e.params["dimension_numbers"][1][0]]
    assert len(products) >= 7 * model.config.num_layers + 1
    return products


SINGLE_ROWS = {
    "a decode step of one sequence": make_batch(1, 1, decode=True),
    "a prefill of one token": make_batch(1, 1, decode=False),
    "logits of one row": make_batch(8, 1, decode=False, logit_rows=1),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", SINGLE_ROWS)
def test_no_product_with_a_weight_has_one_row(case, dtype):
    for product in weight_products(random_model(CONFIG, seed=0, dtype=dtype), SINGLE_ROWS[case]):
        assert product.invars[0].aval.shape[0] >= 2


@pytest.mark.parametrize("decode", [True, False])
def test_a_float32_model_multiplies_at_the_highest_precision(decode):
    model = random_model(CONFIG, seed=0, dtype="float32")
    for product in weight_products(model, make_batch(4, 4, decode=decode)):
        assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}


def test_a_precision_that_was_asked_for_is_used():
    model = random_model(CONFIG, seed=0, dtype="float32")
    config = dataclasses.replace(model.config, matmul_precision=jax.lax.Precision.DEFAULT)
    for product in weight_products(dataclasses.replace(model, config=config), make_batch(4, 4, decode=True)):
        assert set(product.params["precision"]) == {jax.lax.Precision.DEFAULT}


def test_a_bfloat16_model_multiplies_bfloat16_into_float32():
    for product in weight_products(random_model(CONFIG, seed=0), make_batch(4, 4, decode=True)):
        assert {v.aval.dtype for v in product.invars} == {np.dtype(jnp.bfloat16)}
        assert product.outvars[0].aval.dtype == np.float32


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_donated_cache_is_written_in_place(dtype, decode):
    model = random_model(CONFIG, seed=0, dtype=dtype)
    cache = make_cache(model.config)
    jitted = jax.jit(forward, static_argnums=1, donate_argnums=3)
    compiled = jitted.lower(model.params, model.config, make_batch(4, 4, decode=decode), cache).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliases is not None
    assert aliases.group(1).count("alias") == CONFIG.num_layers
    cache_bytes = sum(pages.data.nbytes for pages in cache)
    assert memory.alias_size_in_bytes == cache_bytes
    shape = ",".join(str(size) for size in cache[0].data.shape)
    assert not re.search(rf"\[{shape}\]\S* (copy|convert)\(", text)


def test_no_dtype_and_no_rank_is_promoted_silently():
    with pytest.raises(jax.dtypes.TypePromotionError):  # the switches are on
        jnp.add(jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.float32))
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(jnp.zeros((2, 2)), jnp.zeros(2))
    for compute in ("float32", "bfloat16"):  # weights of one dtype, products of the other
        for stored in ("float32", "bfloat16"):
            model = random_model(CONFIG, seed=0, dtype=stored, compute_dtype=compute)
            shapes = jax.eval_shape(
                lambda params, batch, cache, config=model.config: forward(params, config, batch, cache),
                model.params,
                make_batch(4, 4, decode=False),
                make_cache(model.config),
            )
            assert shapes[0].dtype == np.float32


def test_a_wrong_shape_is_a_type_error():
    weight = jnp.zeros((5, 4))
    with pytest.raises(TypeCheckError):
        linear(CONFIG, jnp.zeros((3, 6)), weight)
    with pytest.raises(TypeCheckError):
        rms_norm(jnp.zeros((3, 6)), jnp.zeros(5), 1e-6)
    model = random_model(CONFIG, seed=0)
    with pytest.raises(TypeCheckError):
        logits(model.params, model.config, jnp.zeros((2, 3, 32)))


def test_a_wrong_number_of_caches_is_refused():
    model = random_model(CONFIG, seed=0)
    with pytest.raises(ValueError, match="1 caches for 2 layers"):
        forward(model.params, model.config, make_batch(4, 4, decode=True), make_cache(model.config)[:1])


def test_a_linear_layer_multiplies_by_the_transpose_and_adds_its_bias():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, dtype=np.dtype(np.float32))
    weight, bias = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    for rows in (1, 3):
        x = rng.normal(size=(rows, 4)).astype(np.float32)
        found = linear(config, jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias))
        np.testing.assert_allclose(np.asarray(found), x @ weight.T + bias, rtol=1e-5, atol=1e-6)
