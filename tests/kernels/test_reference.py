"""The reference itself, against jax.nn's dense attention and against closed forms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels.ragged.reference import attend


def options(**changes: Any) -> dict[str, Any]:
    return {"scale": 0.3, "sliding_window": None, "soft_cap": None, "sinks": None} | changes


def random_sequence(q_len: int, kv_len: int, num_q_heads: int = 4, num_kv_heads: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(q_len, num_q_heads, 8), (kv_len, num_kv_heads, 8), (kv_len, num_kv_heads, 8)]
    return [rng.standard_normal(shape) for shape in shapes]


@pytest.mark.parametrize("window", [None, 3])
def test_it_agrees_with_dense_attention(window: int | None) -> None:
    queries, keys, values = random_sequence(5, 9)
    position, key = np.arange(4, 9)[:, None], np.arange(9)[None]
    seen = (key <= position) & (key > position - (window or 9))
    dense = jax.nn.dot_product_attention(
        *(jnp.asarray(a, jnp.float32)[None] for a in (queries, keys, values)),
        mask=jnp.asarray(seen)[None, None],
        scale=0.3,
    )
    output, _ = attend(queries, keys, values, **options(sliding_window=window))
    np.testing.assert_allclose(output, np.asarray(dense[0]), rtol=1e-4, atol=1e-5)


def test_the_log_sum_exp_is_that_of_the_scores() -> None:
    queries, keys, values = random_sequence(1, 6, 2, 2)
    _, log_sum_exp = attend(queries, keys, values, **options())
    scores = 0.3 * np.einsum("hd,khd->hk", queries[0], keys)
    np.testing.assert_allclose(log_sum_exp[0], np.log(np.exp(scores).sum(axis=1)))


def test_a_sink_only_takes_its_share_of_the_weight() -> None:
    queries, keys, values = random_sequence(3, 6)
    output, log_sum_exp = attend(queries, keys, values, **options())
    sinks = np.array([-1.0, 0.0, 1.0, 2.0])
    with_sinks, lse_with_sinks = attend(queries, keys, values, **options(sinks=sinks))
    np.testing.assert_allclose(lse_with_sinks, np.logaddexp(log_sum_exp, sinks))
    np.testing.assert_allclose(with_sinks, output * np.exp(log_sum_exp - lse_with_sinks)[..., None])


def test_a_soft_cap_bounds_the_scores() -> None:
    queries, keys, values = random_sequence(1, 6, 1, 1)
    _, capped = attend(1e6 * queries, keys, values, **options(soft_cap=2.0))
    signs = np.sign(keys[:, 0] @ queries[0, 0])
    np.testing.assert_allclose(capped[0, 0], np.log(np.exp(2.0 * signs).sum()))
