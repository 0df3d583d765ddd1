"""On a GPU the tables choose: which implementation runs, and with which block sizes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import (
    TritonDecodeBlocks,
    TritonRaggedBlocks,
    append_kv,
    dispatch,
    empty_kv_pages,
    paged_decode_attention,
    ragged_paged_attention,
)
from vsurge.kernels.block_sizes import Entry, Key, choice, user_table_path, write_table
from vsurge.kernels.tuning import Batch, Call, timing

from .batches import Setup, decode_batch, ragged_batch
from .cases import check_decode, check_ragged
from .jaxprs import equations

SEQS, TOKENS, PAGES = 4, 256, 8
DECODE = Key("decode", "bfloat16", "bfloat16", 8, 2, 64, 16)
RAGGED = Key("ragged", "bfloat16", "bfloat16", 8, 2, 64, 16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A GPU's name in the place of this device's, and empty tables."""
    monkeypatch.setenv("VSURGE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "device_here", lambda: "nvidia-test")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    choice._log_once.cache_clear()
    jax.clear_caches()  # of what was traced for this device
    yield "nvidia-test"
    jax.clear_caches()


def shaped(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def kernels_of(kernel: str) -> dict[str, Any]:
    """The Pallas kernels in the program of a call that leaves the implementation open, by name."""
    cache = jax.eval_shape(partial(empty_kv_pages, 99, 16, 2, 64, "bfloat16", platform="cuda"))
    metadata = shaped(SEQS), shaped(SEQS, PAGES)
    if kernel == "decode":
        rows, attend = SEQS, partial(paged_decode_attention, scale=0.1)
    else:
        rows, attend = TOKENS, partial(ragged_paged_attention, scale=0.1)
        metadata = *metadata, shaped(SEQS + 1), shaped(1)
    queries = shaped(rows, 8, 64, dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(attend)(queries, cache, *metadata)
    return {
        equation.params["name"]: equation.params
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "pallas_call"
    }


def grid_and_warps(kernel: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    return kernel["grid_mapping"].grid, kernel["compiler_params"].num_warps


def test_without_a_table_xla_runs_and_one_line_says_how_to_make_one(
    gpu: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vsurge.kernels")
    assert kernels_of("decode") == kernels_of("decode") == kernels_of("ragged") == {}
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert str(DECODE) in caplog.records[0].getMessage()
    assert str(RAGGED) in caplog.records[1].getMessage()
    assert f"vsurge tune --chip {gpu}" in caplog.text


@pytest.mark.parametrize("up_to", [128, 64])  # the call's context, and the longest that was tuned
def test_the_implementation_of_the_table_runs_with_its_block_sizes(gpu: str, up_to: int) -> None:
    blocks = {"kv_tokens": 32, "programs": 20, "num_warps": 2, "num_stages": 2}
    rows = {"rows": 64, "kv_tokens": 32, "num_warps": 4, "num_stages": 2}
    write_table(
        user_table_path(gpu),
        [
            Entry(DECODE, 0, up_to, blocks, implementation="triton"),
            Entry(RAGGED, 0, up_to, rows, implementation="triton"),
        ],
    )
    found = kernels_of("decode")
    assert grid_and_warps(found["paged_decode_attention"]) == ((20 // 2 + SEQS, 2), 2)
    found = kernels_of("ragged")
    num_blocks = TOKENS // (64 // 4) + SEQS
    assert grid_and_warps(found["ragged_paged_attention"]) == ((num_blocks, 2), 4)
    # its single new tokens are decoded as by a call of their own
    assert grid_and_warps(found["paged_decode_attention"]) == ((20 // 2 + SEQS, 2), 2)


def test_where_xla_was_faster_it_runs(gpu: str, caplog: pytest.LogCaptureFixture) -> None:
    entries = [
        Entry(DECODE, 0, 128, {}, implementation="xla"),
        Entry(DECODE, 128, 512, {}, implementation="triton"),
    ]
    write_table(user_table_path(gpu), entries)
    assert kernels_of("decode") == {}
    assert caplog.records == []


def test_a_cache_that_the_kernels_do_not_reach_is_left_to_xla_with_one_line(
    gpu: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = Key("decode", "bfloat16", "int8", 8, 2, 64, 16)
    write_table(user_table_path(gpu), [Entry(key, 0, 128, {}, implementation="triton")])
    for num_pages, by_kernels in ((1000, True), (2**31 // 4096 + 1, False)):
        make = partial(empty_kv_pages, num_pages, 16, 2, 64, "int8", platform="cuda")
        queries, metadata = shaped(SEQS, 8, 64, dtype=jnp.bfloat16), (shaped(SEQS), shaped(SEQS, PAGES))
        attend = partial(paged_decode_attention, scale=0.1)
        program = jax.make_jaxpr(attend)(queries, jax.eval_shape(make), *metadata)
        found = [each.primitive.name for each in equations(program.jaxpr)]
        assert ("pallas_call" in found) == by_kernels
    [record] = caplog.records
    assert "paged_decode_attention: 'xla' in the place of 'triton': kv_pages: 524289 pages" in record.message


@pytest.mark.parametrize(("capability", "converts"), [("8.0", False), ("8.9", True), ("12.0", True)])
def test_float8_is_refused_by_name_where_a_gpu_does_not_convert_it(
    gpu: str,
    capability: str,
    converts: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = Key("decode", "bfloat16", "float8_e4m3fn", 8, 2, 64, 16)
    write_table(user_table_path(gpu), [Entry(key, 0, 128, {}, implementation="triton")])
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    dispatch._log_refusal_once.cache_clear()
    cache = jax.eval_shape(partial(empty_kv_pages, 99, 16, 2, 64, "float8_e4m3fn", platform="cuda"))
    arguments = shaped(SEQS, 8, 64, dtype=jnp.bfloat16), cache, shaped(SEQS), shaped(SEQS, PAGES)
    by_itself = jax.make_jaxpr(partial(paged_decode_attention, scale=0.1))(*arguments)
    found = {each.primitive.name for each in equations(by_itself.jaxpr)}
    assert ("pallas_call" in found) == converts
    complaint = (
        "kv_pages: float8_e4m3fn needs a GPU of compute capability 8.9 or later for Triton's kernels, this "
        "one has 8.0; int8 is as small, or implementation='xla'"
    )
    assert [record.getMessage() for record in caplog.records] == (
        [] if converts else [f"paged_decode_attention: 'xla' in the place of 'triton': {complaint}"]
    )
    asked_for = partial(paged_decode_attention, scale=0.1, implementation="triton")
    if converts:
        jax.make_jaxpr(asked_for)(*arguments)
    else:
        with pytest.raises(ValueError, match=complaint):
            jax.make_jaxpr(asked_for)(*arguments)


def test_rows_are_written_by_xla_without_a_word(gpu: str, caplog: pytest.LogCaptureFixture) -> None:
    del gpu
    cache = jax.eval_shape(partial(empty_kv_pages, 99, 16, 2, 64, "bfloat16", platform="cuda"))
    rows = shaped(3, 2, 64, dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(append_kv)(cache, rows, rows, shaped(3))
    assert "pallas_call" not in {equation.primitive.name for equation in equations(jaxpr.jaxpr)}
    assert caplog.records == []


@pytest.mark.parametrize(
    "blocks", [TritonDecodeBlocks(kv_tokens=16, programs=3), TritonDecodeBlocks(128, 64, 8, 1)], ids=str
)
def test_decoding_is_right_with_any_block_sizes(blocks: TritonDecodeBlocks) -> None:
    batch = decode_batch(Setup(head_dim=16), (270, 3, 0, 128))
    check_decode(batch, "triton", block_sizes=blocks)


@pytest.mark.parametrize(
    "blocks", [TritonRaggedBlocks(rows=16, kv_tokens=32), TritonRaggedBlocks(64, 128, 4, 1)], ids=str
)
def test_prompts_are_right_with_any_block_sizes(blocks: TritonRaggedBlocks) -> None:
    batch = ragged_batch(Setup(head_dim=16), (3, 35, 1), (3, 130, 70))
    check_ragged(batch, "triton", block_sizes=blocks)


@pytest.mark.parametrize(
    ("blocks", "complaint"),
    [
        (TritonDecodeBlocks(kv_tokens=48), "kv_tokens=48 must be a power of two of at least 16"),
        (TritonDecodeBlocks(programs=0), "programs=0 must be at least 1"),
        (TritonDecodeBlocks(num_warps=64), "num_warps=64 must be at most 32"),
        (TritonDecodeBlocks(num_stages=0), "num_stages=0 must be at least 1"),
        (TritonRaggedBlocks(rows=8), "rows=8 must be a power of two of at least 16"),
        (TritonRaggedBlocks(num_warps=3), "num_warps=3 must be a power of two of at least 1"),
    ],
)
def test_block_sizes_that_no_kernel_can_have_are_refused(
    blocks: TritonDecodeBlocks | TritonRaggedBlocks, complaint: str
) -> None:
    setup = Setup(head_dim=16)
    if isinstance(blocks, TritonDecodeBlocks):
        run = partial(check_decode, decode_batch(setup, (3,)))
    else:
        run = partial(check_ragged, ragged_batch(setup, (3,), (3,)))
    with pytest.raises(ValueError, match=f"block_sizes: {complaint}"):
        run("triton", block_sizes=blocks)


def test_a_gpu_call_is_timed_as_the_difference_of_two_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # When each program begins and ends, in seconds; the first run, which compiles, does not count.
    clock = iter([0.0, 90.0, 100.0, 190.0, 200.0, 201.0, 202.0, 209.0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    call = Call(
        kernel="decode", num_q_heads=2, num_kv_heads=1, head_dim=16, page_size=16, max_seqs=2, max_context=32,
        implementation="triton", block_sizes=TritonDecodeBlocks(kv_tokens=16, programs=2), kv_dtype="int8",
    )  # fmt: skip
    assert timing.time_call(call, Batch((20, 3)), repeats=1, calls=(1, 3)) == (7 - 1) / 2 * 1e6


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_a_cache_to_be_timed_is_drawn_in_its_own_dtype(dtype: str) -> None:
    """It fills most of the memory: there is no room for it in 32 bits beside it."""
    drawn = timing.random_array(jax.random.key(0), (64, 128), dtype)
    assert drawn.dtype == dtype
    numbers = np.asarray(drawn, np.float32)
    assert np.isfinite(numbers).all()
    assert numbers.std() > 0.5
    draw = jax.make_jaxpr(lambda key: timing.random_array(key, (64, 128), dtype))(jax.random.key(0))
    shapes = {v.aval for equation in equations(draw.jaxpr) for v in equation.outvars}
    assert not any(aval.dtype == jnp.float32 and aval.size == 64 * 128 for aval in shapes)
