"""What the cache and the writes to it refuse, and how they say so."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from vsurge.kernels import append_kv, empty_kv_pages
from vsurge.kernels.append import mosaic_tpu as append_tpu
from vsurge.kernels.tuning import Call
from vsurge.kernels.tuning.compiler import trace_for


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"keys": jnp.ones((3, 1, 8))},
            r"keys: shape \(3, 1, 8\), expected \(3, 2, 8\) \(3 tokens, KV heads, head",
        ),
        ({"values": jnp.ones((2, 2, 8))}, r"values: shape \(2, 2, 8\), expected \(3, 2, 8\)"),
        (
            {"keys": jnp.ones((3, 2, 8), jnp.int32)},
            "keys: dtype int32, must be one of .'bfloat16', 'float32'",
        ),
        ({"values": jnp.ones((3, 2, 8), jnp.float16)}, "values: dtype float16, must be one of"),
        ({"slots": jnp.ones((3,))}, r"slots: float32\[3\], expected int32\[num_tokens\]"),
        ({"slots": jnp.ones((3, 1), jnp.int32)}, r"slots: int32\[3, 1\]"),
        ({"implementation": "fastest"}, "implementation='fastest'"),
    ],
)
def test_append_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"keys": jnp.ones((3, 2, 8)), "values": jnp.ones((3, 2, 8))}
    arguments["slots"] = jnp.arange(3, dtype=jnp.int32)
    with pytest.raises(ValueError, match=message):
        append_kv(empty_kv_pages(4, 16, 2, 8, "float32"), **arguments | change)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([3, 64, -1], r"slots\[1\]=64: must be less than num_pages \* page_size = 64, or negative"),
        ([3, -1, 2**31 - 1], r"slots\[2\]=2147483647: must be less than"),
        ([5, 63, 5], r"slots\[2\]=5: token 0 is written there as well"),
    ],
)
def test_debug_refuses_slots_of_append(slots: list[int], message: str) -> None:
    rows = jnp.ones((3, 2, 8))

    def append(slots: jax.Array) -> Any:
        return append_kv(empty_kv_pages(4, 16, 2, 8, "float32"), rows, rows, slots, debug=True)

    good, bad = (jnp.asarray(values, jnp.int32) for values in ([63, -1, -1], slots))
    jax.block_until_ready((append(good), jax.jit(append)(good)))
    with pytest.raises(ValueError, match=message):
        append(bad)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"ValueError: .*{message}"):
        jax.block_until_ready(jax.jit(append)(bad))


def test_an_append_that_vector_or_scalar_memory_has_no_room_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many heads as no model has, and chunks of tokens far larger than those that are written at once."""
    call = Call(kernel="append", num_q_heads=256, num_kv_heads=256, head_dim=256, max_tokens=16)
    trace_for("v5e", call.function(), *call.arguments())
    message = r"kv_pages: 16 pieces of 256 KV heads with head_dim 256 .* need 71303168 .*, which has 16777216"
    with pytest.raises(ValueError, match=message):
        trace_for("v4", call.function(), *call.arguments())
    few = Call(kernel="append", num_q_heads=1, num_kv_heads=1, max_tokens=90112)
    trace_for("v6e", few.function(), *few.arguments())  # in chunks
    jax.clear_caches()
    monkeypatch.setattr(append_tpu, "ROW_BYTES", 2**26)
    with pytest.raises(ValueError, match=r"slots: 90112 tokens at once need 1097728 bytes of scalar memory"):
        trace_for("v6e", few.function(), *few.arguments())
    jax.clear_caches()


@pytest.mark.parametrize("name", ["num_pages", "page_size", "num_kv_heads", "head_dim"])
def test_a_cache_has_no_empty_dimension(name: str) -> None:
    sizes = {"num_pages": 4, "page_size": 16, "num_kv_heads": 2, "head_dim": 8} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
        empty_kv_pages(**sizes, dtype="float32")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", ["float16", "uint8", "float64", "float8_e5m2"])
def test_a_cache_of_another_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype={dtype}: a cache can hold"):
        empty_kv_pages(4, 16, 2, 8, dtype)
