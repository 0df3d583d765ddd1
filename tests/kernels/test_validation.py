"""What the attention kernels refuse, and how they say so; test_cache_validation.py has the cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from vsurge.kernels import (
    Implementation,
    empty_kv_pages,
    paged_decode_attention,
    ragged_paged_attention,
)

from .cases import IMPLEMENTATIONS


def ragged_arguments() -> dict[str, Any]:
    """Two sequences, of 3 new tokens in 20 and 2 in 2; 4 pages of 16 tokens, 2 of them in use."""
    return {
        "queries": jnp.ones((5, 4, 8)),
        "kv_pages": empty_kv_pages(4, 16, 2, 8, "float32"),
        "kv_lens": jnp.asarray([20, 2], jnp.int32),
        "page_table": jnp.asarray([[0, 1], [2, 99]], jnp.int32),
        "query_starts": jnp.asarray([0, 3, 5], jnp.int32),
        "num_seqs": jnp.asarray([2], jnp.int32),
        "scale": 0.5,
    }


def decode_arguments() -> dict[str, Any]:
    arguments = ragged_arguments() | {"queries": jnp.ones((2, 4, 8))}
    return {name: arguments[name] for name in ("queries", "kv_pages", "kv_lens", "page_table", "scale")}


def integers(values: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.asarray(value, jnp.int32) for name, value in values.items()}


BAD_FOR_BOTH = [
    ({"queries": jnp.ones((5, 32))}, r"queries: shape \(5, 32\)"),
    ({"queries": jnp.ones((2, 4, 8), jnp.float16)}, "queries: dtype float16"),
    ({"queries": jnp.ones((2, 4, 6))}, "queries: head_dim 6, but the cache's is 8"),
    ({"queries": jnp.ones((2, 3, 8))}, "queries: 3 query heads, must be a multiple of the 2 KV heads"),
    ({"kv_lens": jnp.ones((2,))}, "kv_lens: dtype float32, must be int32"),
    ({"kv_lens": jnp.ones((2, 1), jnp.int32)}, r"kv_lens: shape \(2, 1\)"),
    ({"page_table": jnp.ones((3, 2), jnp.int32)}, r"page_table: shape \(3, 2\), expected \(2, -1\)"),
    ({"page_table": jnp.ones((2,), jnp.int32)}, r"page_table: shape \(2,\)"),
    ({"page_table": jnp.ones((2, 0), jnp.int32)}, r"page_table: shape \(2, 0\), needs at least one page"),
    ({"scale": 0.0}, r"scale=0.0: must be a positive number"),
    ({"scale": float("nan")}, "scale=nan"),
    ({"sliding_window": 0}, "sliding_window=0: must be at least 1 token"),
    ({"soft_cap": -1.0}, "soft_cap=-1.0: must be a positive number"),
    ({"sinks": jnp.ones((2,))}, r"sinks: shape \(2,\), expected one per query head \(4,\)"),
    ({"slots": jnp.ones((2,), jnp.int32)}, "slots without new_kv: give both, or none"),
    ({"new_kv": (jnp.ones((2, 2, 8)),) * 2}, "new_kv without slots"),
    ({"block_sizes": (8, 128)}, r"block_sizes=\(8, 128\): 'xla' has none"),
    ({"implementation": "fastest"}, "implementation='fastest': .* has '"),
]
BAD_FOR_RAGGED = [
    ({"query_starts": jnp.ones((2,), jnp.int32)}, r"query_starts: shape \(2,\), expected \(3,\)"),
    ({"kv_lens": jnp.ones((0,), jnp.int32)}, r"kv_lens: shape \(0,\), expected \[max_seqs\] with at least"),
    ({"num_seqs": jnp.ones((2,), jnp.int32)}, r"num_seqs: shape \(2,\), expected \(1,\)"),
    ({"queries": jnp.ones((5, 1, 4, 8))}, r"queries: shape \(5, 1, 4, 8\), expected \[rows, num_q_heads"),
]


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(("change", "message"), BAD_FOR_BOTH + BAD_FOR_RAGGED)
def test_ragged_attention_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(**ragged_arguments() | change)


NEW: dict[str, Any] = {"new_kv": (jnp.ones((2, 2, 8)),) * 2, "slots": jnp.asarray([19, 33], jnp.int32)}
BAD_FOR_DECODE = [
    (NEW | {"slots": jnp.ones((2,))}, "slots: dtype float32, must be int32"),
    (NEW | {"slots": jnp.ones((2, 1), jnp.int32)}, r"slots: shape \(2, 1\), expected \(2,\)"),
    (
        NEW | {"new_kv": (jnp.ones((2, 2, 8)), jnp.ones((2, 4, 8)))},
        r"new_kv: values: shape \(2, 4, 8\), expected",
    ),
    (NEW | {"new_kv": (jnp.ones((2, 2, 8), jnp.int32),) * 2}, "new_kv: keys: dtype int32, must be one of"),
    ({"queries": jnp.ones((2, 9, 4, 8))}, "queries: 9 per sequence, must be 1 to 8; ragged_paged_attention"),
    ({"queries": jnp.ones((2, 0, 4, 8))}, "queries: 0 per sequence, must be 1 to 8"),
    ({"queries": jnp.ones((2, 1, 1, 4, 8))}, r"queries: shape \(2, 1, 1, 4, 8\)"),
]


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(("change", "message"), BAD_FOR_BOTH + BAD_FOR_DECODE)
def test_decode_attention_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_decode_attention(**decode_arguments() | change)


BAD_METADATA = [
    ({"num_seqs": [3]}, r"num_seqs=3: must lie between 0 and 2"),
    ({"num_seqs": [-1]}, r"num_seqs=-1"),
    ({"query_starts": [1, 3, 5]}, r"query_starts\[0\]=1: must be 0"),
    ({"query_starts": [0, 3, 2]}, r"sequence 1: require 0 <= q_len=-1 <= kv_len=2"),
    ({"query_starts": [0, 3, 6]}, r"sequence 1: require 0 <= q_len=3 <= kv_len=2"),
    ({"kv_lens": [20, 3], "query_starts": [0, 3, 6]}, r"its queries end at 6, beyond num_tokens=5"),
    ({"kv_lens": [33, 2]}, r"sequence 0: require kv_len=33 <= pages_per_seq \* page_size = 32"),
    ({"page_table": [[0, 4], [2, 9]]}, r"sequence 0: pages \[0, 4\] must lie in 0\.\.3"),
    ({"page_table": [[0, 1], [-1, 9]]}, r"sequence 1: pages \[-1\] must lie in 0\.\.3"),
]


@pytest.mark.parametrize(("change", "message"), BAD_METADATA)
def test_debug_refuses_metadata(change: dict[str, Any], message: str) -> None:
    changed = integers(change)
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(**ragged_arguments() | changed, debug=True)


@pytest.mark.parametrize(("change", "message"), BAD_METADATA)
def test_debug_refuses_metadata_inside_a_compiled_program(change: dict[str, Any], message: str) -> None:
    changed = integers(change)
    arguments = ragged_arguments()
    scale = arguments.pop("scale")
    attend = jax.jit(lambda arguments: ragged_paged_attention(**arguments, scale=scale, debug=True))
    jax.block_until_ready(attend(arguments))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"ValueError: .*{message}"):
        jax.block_until_ready(attend(arguments | changed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lens": [20, -1]}, r"sequence 1: require 0 <= q_len=0 <= kv_len=-1"),
        ({"kv_lens": [33, 0]}, r"sequence 0: require kv_len=33"),
        ({"page_table": [[0, 1], [7, 9]]}, r"sequence 1: pages \[7\]"),
    ],
)
def test_debug_refuses_metadata_of_decode(change: dict[str, Any], message: str) -> None:
    changed = integers(change)
    with pytest.raises(ValueError, match=message):
        paged_decode_attention(**decode_arguments() | changed, debug=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [20, 33]}, r"sequence 0: slot=20, its page table says 19"),
        ({"slots": [-1, 33], "kv_lens": [20, 0]}, r"sequence 1: slot=33 of a token before its begin"),
        ({"slots": [3, 33], "kv_lens": [4, 18], "page_table": [[0, 1], [2, 0]]}, r"page 0, which sequence 1"),
    ],
)
def test_debug_refuses_slots_of_decode(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_decode_attention(**decode_arguments() | NEW | integers(change), debug=True)


# Of `ragged_arguments`: new tokens at positions 17 to 19 of pages 0 and 1, and 0 and 1 of page 2.
NEW_TO_RAGGED: dict[str, Any] = {
    "new_kv": (jnp.ones((5, 2, 8)),) * 2,
    "slots": jnp.asarray([17, 18, 19, 32, 33], jnp.int32),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [17, 18, 20, 32, 33]}, r"sequence 0: slots\[2\]=20, its page table says 19"),
        ({"slots": [-1, 18, 19, 32, 99]}, r"sequence 1: slots\[4\]=99, its page table says 33"),
        ({"slots": [17, 18, 19, 32, 33], "num_seqs": [1]}, r"slots\[3\]=32: of no sequence's token, must be"),
        (
            {"slots": [17, 18, 19, 16, 17], "page_table": [[0, 1], [1, 99]], "kv_lens": [20, 2]},
            r"slots\[4\]=17: token 0 is written there as well",
        ),
    ],
)
def test_debug_refuses_slots_of_ragged(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(**ragged_arguments() | NEW_TO_RAGGED | integers(change), debug=True)


def test_debug_accepts_slots_of_ragged_and_refuses_them_inside_a_compiled_program() -> None:
    ragged_paged_attention(**ragged_arguments() | NEW_TO_RAGGED, debug=True)
    some_are_there = integers({"slots": [-1, 18, 19, -7, 33]})
    ragged_paged_attention(**ragged_arguments() | NEW_TO_RAGGED | some_are_there, debug=True)
    arguments = ragged_arguments() | NEW_TO_RAGGED
    scale = arguments.pop("scale")
    attend = jax.jit(lambda arguments: ragged_paged_attention(**arguments, scale=scale, debug=True))
    jax.block_until_ready(attend(arguments))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"ValueError: .*sequence 1: slots\[3\]=31"):
        jax.block_until_ready(attend(arguments | integers({"slots": [17, 18, 19, 31, 33]})))


def test_debug_refuses_slots_inside_a_compiled_program() -> None:
    arguments = decode_arguments() | NEW
    scale = arguments.pop("scale")
    attend = jax.jit(lambda arguments: paged_decode_attention(**arguments, scale=scale, debug=True))
    jax.block_until_ready(attend(arguments))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"ValueError: .*sequence 0: slot=20"):
        jax.block_until_ready(attend(arguments | integers({"slots": [20, 33]})))


def test_debug_accepts_nonsense_where_nobody_looks() -> None:
    beyond_num_seqs = {"num_seqs": [1], "query_starts": [0, 5, -3], "kv_lens": [20, 10**6]}
    ragged_paged_attention(**ragged_arguments() | integers(beyond_num_seqs), debug=True)
    padding = {"kv_lens": [0, 2], "page_table": [[-5, 77], [2, 9]]}
    paged_decode_attention(**decode_arguments() | integers(padding), debug=True)
    more_than_tokens: dict[str, Any] = {"queries": jnp.ones((2, 8, 4, 8))}
    paged_decode_attention(**decode_arguments() | integers(padding) | more_than_tokens, debug=True)


def test_the_type_checker_is_awake() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        ragged_paged_attention(**ragged_arguments() | integers({"query_starts": [0] * 7}))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_decode_batch_may_be_empty(implementation: Implementation) -> None:
    arguments = decode_arguments() | integers({"kv_lens": [], "page_table": np.zeros((0, 2))})
    arguments["queries"] = jnp.ones((0, 4, 8))
    output, log_sum_exp = paged_decode_attention(**arguments, return_lse=True, implementation=implementation)
    assert (output.shape, log_sum_exp.shape) == ((0, 4, 8), (0, 4))
