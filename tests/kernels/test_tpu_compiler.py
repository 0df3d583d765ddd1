"""The kernels for TPU through the real compiler, for every generation, without a TPU."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from vsurge.benchmarks.tpu import tables
from vsurge.kernels import SUPPORTED_DTYPES, DecodeBlocks
from vsurge.kernels.quantization import LARGEST
from vsurge.kernels.tuning import CHIPS, compile_for, compiler

from ..compilation_cache import cache_reset
from .compiled import (
    NUM_PAGES,
    SMALL,
    assert_in_place,
    compile_append,
    compile_decode,
    compile_fused,
    compile_ragged,
    shape,
)
from .geometries import HEADS, MODELS, shares

pytestmark = pytest.mark.usefixtures("small_units")  # others take longer to compile: see test_tpu_memory.py


def kernels_in(program: jax.stages.Compiled) -> int:
    return (program.as_text() or "").count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("chip", CHIPS)
def test_every_generation_takes_the_kernels_and_writes_the_cache_in_place(chip: str) -> None:
    assert kernels_in(compile_ragged(chip)) == 2  # prompts, and single new tokens
    for program in (compile_fused(chip), compile_append(chip)):
        assert kernels_in(program) == 1
        assert_in_place(program)


@pytest.mark.parametrize(
    ("chip", "heads"),
    [
        pytest.param(
            chip, heads, marks=() if heads == (64, 8) or (chip, heads) == ("v4", (8, 1)) else pytest.mark.slow
        )
        for chip in CHIPS
        for heads in ((16, 8), (32, 8), (64, 8), (8, 1))
    ],
    ids=str,
)
def test_every_generation_decodes_the_models_and_a_shard(chip: str, heads: tuple[int, int]) -> None:
    assert kernels_in(compile_decode(chip, heads)) == 1


def test_the_heads_are_those_of_every_model_and_every_shard() -> None:
    assert {heads for heads in MODELS if heads in HEADS} == set(MODELS)
    assert set(tables.all_heads()) <= set(HEADS)
    assert {(40, 8), (5, 1), (8, 4), (4, 2), (32, 4), (16, 2), (64, 4), (16, 1)} <= set(HEADS)
    assert all(q % kv == 0 and kv >= 1 for q, kv in HEADS)
    assert shares(32, 4) == [(32, 4), (16, 2), (8, 1), (4, 1)]  # the last two devices of each four share one


@pytest.mark.parametrize(
    ("chip", "heads", "num_queries"),
    [
        pytest.param(chip, heads, num_queries, marks=() if case in ("v4", "v6e") else pytest.mark.slow)
        for chip in CHIPS
        for case, heads, num_queries in [(chip, (8, 2), 4), ("largest", (64, 8), 8), ("odd", (40, 8), 3)]
    ],
)
def test_several_queries_compile(chip: str, heads: tuple[int, int], num_queries: int) -> None:
    compile_decode(chip, heads, num_queries=num_queries, sliding_window=1000)


@pytest.mark.parametrize(
    "heads",
    [pytest.param(heads, marks=() if heads == (5, 1) else pytest.mark.slow) for heads in HEADS],
    ids=str,
)
def test_shards_compile(heads: tuple[int, int]) -> None:
    compile_decode("v6e", heads)
    compile_ragged("v6e", heads)
    compile_append("v6e", heads[1])


PAGES = list(itertools.product([16, 256], [64, 128, 256], SUPPORTED_DTYPES))


@pytest.mark.parametrize(
    ("page_size", "head_dim", "dtype"),
    [pytest.param(*page, marks=() if i == 11 else pytest.mark.slow) for i, page in enumerate(PAGES)],
    ids=str,
)
def test_every_page_compiles(page_size: int, head_dim: int, dtype: Any) -> None:
    compile_decode("v5e", (8, 2), head_dim, page_size, dtype)
    compile_ragged("v5e", (8, 2), head_dim, page_size, dtype)
    compile_append("v5e", 2, head_dim, page_size, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("page_size", "head_dim", "dtype"), PAGES, ids=str)
def test_every_page_is_written_while_it_is_read(page_size: int, head_dim: int, dtype: Any) -> None:
    compile_fused("v5e", (8, 2), head_dim, page_size, dtype)


@pytest.mark.parametrize(
    ("num_kv_heads", "page_size"),
    [
        (8, 16),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(1, 16), (2, 64), (4, 128), (8, 64)]),
    ],
)
def test_no_kernel_has_a_quantized_cache_copied(num_kv_heads: int, page_size: int) -> None:
    heads = (2 * num_kv_heads, num_kv_heads)
    for program in (
        compile_append("v6e", num_kv_heads, page_size=page_size, dtype="int8"),
        compile_decode("v6e", heads, page_size=page_size, dtype="int8"),
    ):
        text = program.as_text() or ""
        assert f"f32[{NUM_PAGES},2,{num_kv_heads}," in text
        assert re.findall(rf"= \w+\[{NUM_PAGES},2,{num_kv_heads},\S* copy", text) == []


def test_options_and_lanes_compile() -> None:
    blocks = DecodeBlocks(kv_tokens=256, lanes=4, depth=3)
    compile_decode("7x", (8, 1), sliding_window=1000, soft_cap=30.0, block_sizes=blocks)
    compile_fused("7x", (8, 1), sliding_window=1000, soft_cap=30.0, block_sizes=blocks)
    compile_ragged("7x", (8, 1), sliding_window=1000, soft_cap=30.0, return_lse=True)


@pytest.mark.parametrize("page_size", [pytest.param(16, marks=pytest.mark.slow), 64])
def test_the_largest_batch_of_the_longest_context_compiles(page_size: int) -> None:
    """Its page table is larger than the scalar memory."""
    compile_decode("v6e", (8, 1), 128, page_size, num_seqs=256, context=2**17)
    compile_fused("v6e", (8, 1), 128, page_size, num_seqs=256, context=2**17)
    compile_ragged("v6e", (8, 1), 128, page_size, num_seqs=256, context=2**17)


@pytest.mark.parametrize(
    ("num_tokens", "dtype"),
    [
        *((num_tokens, "bfloat16") for num_tokens in (1, 64, 4096)),
        (64, "int8"),
        pytest.param(4096, "float8_e4m3fn", marks=pytest.mark.slow),
    ],
)
def test_the_cache_is_written_in_place(num_tokens: int, dtype: str) -> None:
    assert_in_place(compile_append("v6e", page_size=128, dtype=dtype, num_tokens=num_tokens), 128, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "heads"), list(itertools.product(CHIPS, HEADS)), ids=str)
def test_every_generation_takes_every_shard(chip: str, heads: tuple[int, int]) -> None:
    for page_size in (16, 32, 64, 128, 256):
        compile_decode(chip, heads, page_size=page_size)
        compile_fused(chip, heads, page_size=page_size)
        compile_ragged(chip, heads, page_size=page_size, block_sizes=SMALL if page_size < 256 else None)
        compile_append(chip, heads[1], page_size=page_size)


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "dtype"), list(itertools.product(CHIPS, LARGEST)), ids=str)
def test_every_generation_takes_quantized_caches(chip: str, dtype: Any) -> None:
    for heads, page_size in (((32, 8), 64), ((32, 8), 16), ((8, 1), 256)):
        compile_decode(chip, heads, page_size=page_size, dtype=dtype)
        compile_ragged(chip, heads, page_size=page_size, dtype=dtype)
        compile_append(chip, heads[1], page_size=page_size, dtype=dtype)
    compile_ragged(chip, dtype=dtype, block_sizes=None)
    blocks = DecodeBlocks(kv_tokens=256, lanes=2, depth=3)
    compile_decode(chip, (8, 2), dtype=dtype, sliding_window=1000, soft_cap=30.0, block_sizes=blocks)


def test_a_program_that_is_in_the_compilation_cache_is_compiled_again(tmp_path: Path) -> None:
    with cache_reset():
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for _ in range(2):  # the second one without the warning that the first one's program cannot be read
            jax.clear_caches()
            compile_for("v6e", jnp.sin, shape(8, 128, dtype="float32"))
            assert list(tmp_path.iterdir())


def test_an_unknown_chip_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"chip='v3': must be one of \('v4'"):
        compile_for("v3", jnp.sin, shape(1))


def test_two_processes_can_compile_at_once() -> None:
    """libtpu takes a lock against sharing a TPU, which compiling does not need."""
    compile_for("v6e", jnp.sin, shape(8, 128, dtype="float32"))
    program = (
        "import jax; from vsurge.kernels.tuning import compile_for;"
        "compile_for('v6e', jax.numpy.sin, jax.ShapeDtypeStruct((8, 128), 'float32')); print('compiled')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert "compiled" in run.stdout, run.stderr


def test_without_libtpu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "find_spec", lambda _: None)
    for known in (compiler._mesh, compiler.topology_devices):
        known.cache_clear()
    with pytest.raises(RuntimeError, match=r"needs libtpu: pip install 'vsurge\[tune\]'"):
        compile_for("v6e", jnp.sin, shape(1))
