"""A sequence whose numbers are not finite keeps them to itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import (
    DecodeBlocks,
    Implementation,
    KVPages,
    paged_decode_attention,
    ragged_paged_attention,
)

from .batches import Setup, decode_batch, ragged_batch
from .cases import each_implementation_slowly

pytestmark = pytest.mark.usefixtures("small_units")

SETUP = Setup(num_q_heads=4, num_kv_heads=2, page_size=32)
LENGTHS = (40, 150, 40, 7)
DAMAGED = 1  # which sequence
Damage = Callable[[Any, KVPages, int, Any], tuple[Any, KVPages]]


def in_query(queries: Any, kv_pages: KVPages, _: int, value: Any) -> tuple[Any, KVPages]:
    return queries.at[DAMAGED, 1, 5].set(value), kv_pages


def in_cache(kind: int) -> Damage:
    def damage(queries: Any, kv_pages: KVPages, page: int, value: Any) -> tuple[Any, KVPages]:
        return queries, replace(kv_pages, data=kv_pages.data.at[page, kind, 1, 3, 5].set(value))

    return damage


DAMAGES: dict[str, Damage] = {"query": in_query, "key": in_cache(0), "value": in_cache(1)}


def check(run: Callable[[Any, KVPages], Any], queries: Any, kv_pages: KVPages, page: int) -> None:
    """Sequences have one row each, the damaged one included."""
    whole = np.asarray(run(queries, kv_pages))
    assert np.isfinite(whole).all()
    others = np.arange(len(whole)) != DAMAGED
    for where, damage in DAMAGES.items():
        for value in (jnp.nan, jnp.inf):
            out = np.asarray(run(*damage(queries, kv_pages, page, value)))
            np.testing.assert_array_equal(out[others], whole[others], err_msg=f"{value} in a {where}")
            assert not np.array_equal(out[DAMAGED], whole[DAMAGED]), where


@pytest.mark.parametrize(
    ("implementation", "blocks"),
    [
        ("xla", None),
        ("triton", None),
        pytest.param("mosaic_tpu", DecodeBlocks(128, lanes=1, depth=2), marks=pytest.mark.slow),
        ("mosaic_tpu", DecodeBlocks(128, lanes=2, depth=2)),
    ],
    ids=str,
)
def test_what_is_not_finite_in_a_sequence_reaches_no_other(
    implementation: Implementation, blocks: DecodeBlocks | None
) -> None:
    queries, kv_pages, *rest = decode_batch(SETUP, LENGTHS, share=False).arguments

    def run(queries: Any, kv_pages: KVPages) -> Any:
        return paged_decode_attention(
            queries, kv_pages, *rest, scale=0.1, implementation=implementation, block_sizes=blocks
        )

    check(run, queries, kv_pages, int(rest[1][DAMAGED, 0]))


@each_implementation_slowly
def test_nor_in_a_step_with_prompts(implementation: Implementation) -> None:
    batch = ragged_batch(SETUP, (1, 1, 1, 20), (*LENGTHS[:3], 20), share=False)
    queries, kv_pages, *rest = batch.arguments

    def run(queries: Any, kv_pages: KVPages) -> Any:
        out = ragged_paged_attention(queries, kv_pages, *rest, scale=0.1, implementation=implementation)
        return out[batch.owned]

    check(run, queries, kv_pages, int(rest[1][DAMAGED, 0]))
