"""What is measured of the kernels: which calls, of whose implementation, and what each cannot do without.

A run calls the kernel once for each of several caches, as many as together exceed what a processor keeps
close: no call finds its keys and values where the one before has left them.
"""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import gcd
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ...kernels import KVPages, append_kv, empty_kv_pages, paged_decode_attention, ragged_paged_attention
from ...kernels.block_sizes import Key
from ...kernels.kv_pages import bytes_per_token
from ...kernels.tuning.timing import random_array
from ..attention import blocks_of

Call = Callable[[], Any]

APART = {"cpu": 256 * 2**20, "gpu": 512 * 2**20, "tpu": 512 * 2**20}  # bytes of all caches, at least
MOST_CALLS = 64  # of a run
OURS = {"cpu": ("xla",), "gpu": ("xla", "triton"), "tpu": ("xla", "mosaic_tpu")}
PAGED = "jax's paged_attention"
DENSE = {"cpu": "jax's dot_product_attention", "gpu": "cuDNN", "tpu": "jax's dot_product_attention"}
SHORTEST = 32  # tokens, where lengths are drawn


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """A call.

    Attributes:
        kernel: "decode", "prefill" or "append".
        implementation: of `OURS`, or one of jax's.
        num_q_heads, num_kv_heads, head_dim, page_size: shapes.
        kv_dtype: of the cache.
        num_seqs: sequences.
        context: tokens of each, or of the longest.
        new_tokens: of each sequence; 1 but for "prefill".
        skewed: whether lengths are drawn log-uniform up to `context`.
    """

    kernel: str
    implementation: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128
    page_size: int = 64
    kv_dtype: str = "bfloat16"
    num_seqs: int = 1
    context: int
    new_tokens: int = 1
    skewed: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, the new ones among them."""
        if not self.skewed:
            return (self.context,) * self.num_seqs
        drawn = np.random.default_rng(0).uniform(np.log(SHORTEST), np.log(self.context), self.num_seqs)
        return tuple(np.exp(drawn).round().astype(int).tolist())

    @property
    def num_bytes(self) -> int:
        """Of the keys and values that are there, once; for "append" of those that are written."""
        tokens = self.num_seqs * self.new_tokens if self.kernel == "append" else sum(self.lengths)
        return tokens * bytes_per_token(self.num_kv_heads, self.head_dim, jnp.dtype(self.kv_dtype))

    @property
    def operations(self) -> int:
        """4 for each visible pair of a query and a key, each query head and each dimension of it."""
        if self.kernel == "append":
            return 0
        new = self.new_tokens
        pairs = sum(new * (2 * length - new + 1) // 2 for length in self.lengths)
        return 4 * pairs * self.num_q_heads * self.head_dim

    @property
    def whose(self) -> str:
        """As a table says it."""
        theirs = self.implementation == PAGED or self.implementation in DENSE.values()
        return self.implementation if theirs else f"vSurge {self.implementation}"

    @property
    def blocks(self) -> str:
        """Block sizes, of Triton's attention kernels."""
        if self.kernel == "append":
            return ""
        heads = self.num_q_heads, self.num_kv_heads
        kernel = "decode" if self.kernel == "decode" else "ragged"
        key = Key(kernel, "bfloat16", self.kv_dtype, *heads, self.head_dim, self.page_size)
        return blocks_of(self.implementation, key, _pages_per_seq(self) * self.page_size)

    @property
    def case(self) -> dict[str, Any]:
        blocks = self.blocks
        return {
            "heads": f"{self.num_q_heads}/{self.num_kv_heads} x {self.head_dim}",
            "kv": self.kv_dtype,
            "page": self.page_size,
            "sequences": self.num_seqs,
            "context": f"{SHORTEST}-{self.context}" if self.skewed else self.context,
            "new": self.new_tokens,
            **({"blocks": blocks} if blocks else {}),
        }

    def num_calls(self, platform: str) -> int:
        """Of a run."""
        return max(1, min(MOST_CALLS, -(-APART[platform] // max(self.num_bytes, 1))))

    def build(self, platform: str) -> Call:
        """The run, compiled at its first call: all calls, each on its own cache.

        Args:
            platform: "cpu", "gpu" or "tpu".

        Raises:
            Exception: whatever the implementation raises at what it does not support.
        """
        count = self.num_calls(platform)
        if self.kernel == "append":
            return _append(self, count)
        if self.implementation == PAGED:
            return _jax_paged(self, platform, count)
        if self.implementation in DENSE.values():
            return _dense(self, platform, count)
        return _decode(self, count) if self.kernel == "decode" else _prefill(self, platform, count)


def cases(platform: str, heads: tuple[int, int], *, thorough: bool = False) -> Iterator[KernelCase]:
    """What is measured on a platform.

    Args:
        platform: "cpu", "gpu" or "tpu".
        heads: of queries, and of keys and values.
        thorough: over everything; else a sample that takes minutes.
    """
    q, kv = heads
    on_cpu = platform == "cpu"
    shapes: list[tuple[int, int, int, str, bool]] = [  # sequences, context, page, dtype, skewed
        (1, 8192 if on_cpu else 65536, 64, "bfloat16", False),
        (16 if on_cpu else 64, 512, 64, "bfloat16", False),
        (16 if on_cpu else 64, 2048, 64, "bfloat16", False),
        (16 if on_cpu else 64, 2048, 16, "bfloat16", False),
        (16 if on_cpu else 64, 2048, 64, "int8", False),
        (16 if on_cpu else 64, 2048, 64, "bfloat16", True),
    ]
    if not on_cpu:
        shapes += [(256, 512, 64, "bfloat16", False), (64, 8192, 64, "bfloat16", False)]
    if thorough:
        grid = product((1, 4, 16, 64), (128, 512, 2048, 8192), (16, 64, 128), ("bfloat16", "int8"))
        shapes += [(*shape, False) for shape in grid]
    for num_seqs, context, page, dtype, skewed in dict.fromkeys(shapes):
        make = partial(
            KernelCase, kernel="decode", num_q_heads=q, num_kv_heads=kv, page_size=page, kv_dtype=dtype,
            num_seqs=num_seqs, context=context, skewed=skewed,
        )  # fmt: skip
        others: list[str] = []
        if dtype == "bfloat16":
            others += [] if on_cpu else [PAGED]
            others += [DENSE[platform]] if page == 64 else []  # it has no pages, and is measured once
        yield from (make(implementation=name) for name in (*OURS[platform], *others))
    prompts = [(512, 512), (512, 4096)] if on_cpu else [(4096, 4096), (4096, 32768)]
    for new, context in prompts:
        make = partial(
            KernelCase, kernel="prefill", num_q_heads=q, num_kv_heads=kv, context=context, new_tokens=new
        )
        theirs = (DENSE[platform],) if new == context else ()  # jax's has no queries behind a context
        yield from (make(implementation=name) for name in (*OURS[platform], *theirs))
    for num_seqs, new in ((16 if on_cpu else 64, 1), (1, 512 if on_cpu else 4096)):
        yield from (
            KernelCase(
                kernel="append", implementation=name, num_q_heads=q, num_kv_heads=kv, num_seqs=num_seqs,
                context=max(new, 512), new_tokens=new,
            )
            for name in OURS[platform]
        )  # fmt: skip


def _queries(case: KernelCase, num_tokens: int) -> jax.Array:
    shape = num_tokens, case.num_q_heads, case.head_dim
    return jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)


def _pages_per_seq(case: KernelCase) -> int:
    return -(-case.context // case.page_size)


def _table(case: KernelCase) -> jax.Array:
    shape = case.num_seqs, _pages_per_seq(case)
    shuffled = np.random.default_rng(0).permutation(shape[0] * shape[1])
    return jnp.asarray(shuffled.reshape(shape), jnp.int32)


def _caches(case: KernelCase, count: int, *, filled: bool = False) -> tuple[KVPages, ...]:
    """Of zeros, or `filled` with random numbers."""
    num_pages = case.num_seqs * _pages_per_seq(case)
    make = partial(
        empty_kv_pages, num_pages, case.page_size, case.num_kv_heads, case.head_dim, jnp.dtype(case.kv_dtype)
    )
    caches = (make() for _ in range(count))
    if not filled:
        return tuple(caches)
    return tuple(replace(kv, data=_random(i, kv.data.shape, kv.dtype)) for i, kv in enumerate(caches))


def _random(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    return random_array(jax.random.key(seed), shape, dtype)


def _are_filled(case: KernelCase, platform: str) -> bool:
    """Where matrix units bound the time: products of zeros take less power there, and run faster."""
    return case.kernel == "prefill" and platform != "cpu"


def _ours(kernel: Any, case: KernelCase) -> Any:
    return partial(kernel, scale=case.head_dim**-0.5, implementation=case.implementation)


def _decode(case: KernelCase, count: int) -> Call:
    caches, q = _caches(case, count), _queries(case, case.num_seqs)
    lengths, table = jnp.asarray(case.lengths, jnp.int32), _table(case)
    attend = _ours(paged_decode_attention, case)

    @jax.jit
    def run(caches: tuple[KVPages, ...], q: jax.Array, lengths: jax.Array, table: jax.Array) -> Any:
        return [attend(q, kv, lengths, table) for kv in caches]

    return lambda: run(caches, q, lengths, table)


def _prefill(case: KernelCase, platform: str, count: int) -> Call:
    caches = _caches(case, count, filled=_are_filled(case, platform))
    q = _queries(case, case.new_tokens * case.num_seqs)
    starts = jnp.arange(case.num_seqs + 1, dtype=jnp.int32) * case.new_tokens
    batch = (
        jnp.asarray(case.lengths, jnp.int32),
        _table(case),
        starts,
        jnp.asarray([case.num_seqs], jnp.int32),
    )
    attend = _ours(ragged_paged_attention, case)

    @jax.jit
    def run(caches: tuple[KVPages, ...], q: jax.Array, *batch: jax.Array) -> Any:
        return [attend(q, kv, *batch) for kv in caches]

    return lambda: run(caches, q, *batch)


def _append(case: KernelCase, count: int) -> Call:
    held = [_caches(case, count)]
    num_tokens = case.num_seqs * case.new_tokens
    shape = num_tokens, case.num_kv_heads, case.head_dim
    rows = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    num_slots = case.num_seqs * _pages_per_seq(case) * case.page_size
    slots = jnp.asarray(np.random.default_rng(0).permutation(num_slots)[:num_tokens], jnp.int32)
    append: Any = partial(cast(Any, append_kv), implementation=case.implementation)

    @partial(jax.jit, donate_argnums=0)
    def run(caches: tuple[KVPages, ...], rows: jax.Array, slots: jax.Array) -> tuple[KVPages, ...]:
        return tuple(append(kv, rows, rows, slots) for kv in caches)

    def once() -> Any:
        held[0] = run(held[0], rows, slots)
        return held[0]

    return once


def _dense(case: KernelCase, platform: str, count: int) -> Call:
    """jax.nn.dot_product_attention on keys and values that lie in one piece, padded to the longest."""
    shape = case.num_seqs, case.context, case.num_kv_heads, case.head_dim

    def rows(seed: int) -> jax.Array:
        return _random(seed, shape) if _are_filled(case, platform) else jnp.zeros(shape, jnp.bfloat16)

    caches = tuple((rows(2 * i), rows(2 * i + 1)) for i in range(count))
    q = _queries(case, case.num_seqs * case.new_tokens)
    q = q.reshape(case.num_seqs, case.new_tokens, case.num_q_heads, case.head_dim)
    lengths = jnp.asarray(case.lengths, jnp.int32)
    attend = partial(
        jax.nn.dot_product_attention,
        is_causal=case.kernel == "prefill",
        implementation="cudnn" if case.implementation == DENSE["gpu"] else "xla",
    )

    @jax.jit
    def run(caches: tuple[tuple[jax.Array, jax.Array], ...], q: jax.Array, lengths: jax.Array) -> Any:
        return [attend(q, *kv, key_value_seq_lengths=lengths) for kv in caches]

    return lambda: run(caches, q, lengths)


def _jax_paged(case: KernelCase, platform: str, count: int) -> Call:
    """`paged_attention` of jax.experimental.pallas.ops, at its default block sizes as far as they divide."""
    shape = case.num_kv_heads, case.num_seqs * _pages_per_seq(case), case.page_size, case.head_dim
    caches = tuple((jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16)) for _ in range(count))
    q, lengths, table = _queries(case, case.num_seqs), jnp.asarray(case.lengths, jnp.int32), _table(case)

    def attend(q: jax.Array, kv: tuple[jax.Array, jax.Array], lengths: jax.Array, table: jax.Array) -> Any:
        scaled = q * case.head_dim**-0.5
        if platform == "gpu":
            from jax.experimental.pallas.ops.gpu import paged_attention as gpu

            splits, block = gpu_paged_blocks(table.shape[1])
            return gpu.paged_attention(
                scaled, *kv, table, lengths, k_splits=splits, pages_per_compute_block=block
            )
        from jax.experimental.pallas.ops.tpu import paged_attention as tpu

        block = gcd(8, table.shape[1])
        return tpu.paged_attention(scaled, *kv, lengths, table, pages_per_compute_block=block)

    @jax.jit
    def run(caches: Any, q: jax.Array, lengths: jax.Array, table: jax.Array) -> Any:
        return [attend(q, kv, lengths, table) for kv in caches]

    return lambda: run(caches, q, lengths, table)


def gpu_paged_blocks(pages_per_seq: int) -> tuple[int, int]:
    """`k_splits` and `pages_per_compute_block` of jax's kernel for GPUs, its defaults of 16 and 8 or less.

    It refuses splits whose number does not divide the pages of a sequence, and blocks that do not divide
    those of a split.
    """
    splits = gcd(16, pages_per_seq)
    return splits, gcd(8, pages_per_seq // splits)
