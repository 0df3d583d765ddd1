# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Kernel calls to be compiled and replayed: their shapes, and the lengths that they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from ..append import append_kv
from ..block_sizes import Key
from ..block_sizes.table import Tuned, TunedKernel
from ..decode import DecodeBlocks, TritonDecodeBlocks, paged_decode_attention
from ..kv_pages import KVPages, bytes_per_token, empty_kv_pages, scale_tokens
from ..ragged import RaggedBlocks, TritonRaggedBlocks, ragged_paged_attention

Kernel = Literal["decode", "ragged", "append", "jax_ragged"]


@dataclass(frozen=True)
class Batch:
    """The sequences of one call.

    Attributes:
        kv_lens: tokens in the cache per sequence, this step's included.
        q_lens: new tokens per sequence; None for one each.
    """

    kv_lens: tuple[int, ...]
    q_lens: tuple[int, ...] | None = None

    @property
    def new_tokens(self) -> tuple[int, ...]:
        return self.q_lens or (1,) * len(self.kv_lens)


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is compiled of a kernel call: everything but the values.

    Attributes:
        kernel: "decode", "ragged" and "append" are this package's, "jax_ragged" is the one that jax ships.
        num_q_heads, num_kv_heads, head_dim, page_size: as everywhere.
        query_dtype, kv_dtype: of the queries and of the cache.
        max_seqs: rows of the page table.
        max_context: tokens of the longest sequence, by which the page table is as wide as it is.
        max_tokens: rows of queries, of "ragged", "jax_ragged" and "append".
        sliding_window: tokens that a query sees; None for all.
        implementation: of this package's kernels.
        block_sizes: of the kernel; for "jax_ragged" (pages per block, queries per block). None for its own
            choice.
    """

    kernel: Kernel
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128
    page_size: int = 64
    query_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    max_seqs: int = 64
    max_context: int = 8192
    max_tokens: int = 2048
    sliding_window: int | None = None
    implementation: Tuned = "mosaic_tpu"
    block_sizes: (
        DecodeBlocks | RaggedBlocks | TritonDecodeBlocks | TritonRaggedBlocks | tuple[int, int] | None
    ) = None

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_context // self.page_size)

    @property
    def num_pages(self) -> int:
        return self.max_seqs * self.pages_per_seq

    @property
    def key(self) -> Key:
        """Of the tables of block sizes, for "decode" and "ragged"."""
        return Key(
            cast(TunedKernel, self.kernel),
            self.query_dtype,
            self.kv_dtype,
            self.num_q_heads,
            self.num_kv_heads,
            self.head_dim,
            self.page_size,
        )

    @property
    def donate_argnums(self) -> tuple[int, ...]:
        return (0,) if self.kernel == "append" else ()

    def function(self) -> Callable[..., Any]:
        """The function to compile, of `arguments`."""
        scale = self.head_dim**-0.5
        if self.kernel == "append":
            return partial(append_kv, implementation=self.implementation)
        if self.kernel == "jax_ragged":
            from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
                ragged_paged_attention as theirs,
            )

            pages, queries = self.block_sizes if isinstance(self.block_sizes, tuple) else (None, None)
            return partial(
                cast(Callable[..., Any], theirs),
                sm_scale=scale,
                sliding_window=self.sliding_window,
                num_kv_pages_per_block=pages,
                num_queries_per_block=queries,
                vmem_limit_bytes=64 * 2**20,
            )
        attend = paged_decode_attention if self.kernel == "decode" else ragged_paged_attention
        return partial(
            attend,
            scale=scale,
            implementation=self.implementation,
            sliding_window=self.sliding_window,
            block_sizes=self.block_sizes,
        )

    def arguments(self) -> tuple[Any, ...]:
        """The function's arguments, as shapes."""

        def shape(*sizes: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))

        rows = self.max_seqs if self.kernel == "decode" else self.max_tokens
        queries = shape(rows, self.num_q_heads, self.head_dim, dtype=self.query_dtype)
        table = shape(self.max_seqs, self.pages_per_seq)
        if self.kernel == "append":
            new = shape(rows, self.num_kv_heads, self.head_dim, dtype=self.query_dtype)
            return self.cache(), new, new, shape(rows)
        if self.kernel == "decode":
            return queries, self.cache(), shape(rows), table
        cache: Any = self.cache()
        if self.kernel == "jax_ragged":
            sizes = (self.num_pages, self.page_size, 2 * self.num_kv_heads, self.head_dim)
            cache = shape(*sizes, dtype=self.kv_dtype)
        return queries, cache, shape(self.max_seqs), table, shape(self.max_seqs + 1), shape(1)

    def cache(self) -> KVPages:
        """The cache, as the implementation's device stores it."""
        make = partial(
            empty_kv_pages,
            self.num_pages,
            self.page_size,
            self.num_kv_heads,
            self.head_dim,
            self.kv_dtype,
        )
        cache = jax.eval_shape(make)
        data: Any = jax.ShapeDtypeStruct(cache.data.shape, cache.dtype)
        scales: Any = None
        if cache.scales is not None:
            places = scale_tokens(self.page_size, "tpu" if self.implementation == "mosaic_tpu" else "gpu")
            scales = jax.ShapeDtypeStruct((*cache.scales.shape[:3], places), jnp.float32)
        return KVPages(data, scales, cache.dtype, cache.page_size)

    def metadata(self, batch: Batch) -> tuple[np.ndarray | None, ...]:
        """The integers among the leaves of `arguments`, and None for the others.

        Pages lie in the pool in a random order, the same for the same batch.

        Raises:
            ValueError: the batch does not fit the call.
        """
        if len(batch.kv_lens) > self.max_seqs or max(batch.kv_lens) > self.max_context:
            raise ValueError(
                f"batch: {len(batch.kv_lens)} sequences of up to {max(batch.kv_lens)} tokens; "
                f"the call is for {self.max_seqs} of up to {self.max_context}"
            )
        rng = np.random.default_rng(0)
        table = rng.permutation(self.num_pages).reshape(self.max_seqs, -1).astype(np.int32)
        kv_lens = np.zeros(self.max_seqs, np.int32)
        kv_lens[: len(batch.kv_lens)] = batch.kv_lens
        cache = [None] * len(jax.tree.leaves(self.cache()))
        if self.kernel == "decode":
            return None, *cache, kv_lens, table
        starts = np.zeros(self.max_seqs + 1, np.int32)
        ends = np.cumsum(batch.new_tokens)
        if ends[-1] > self.max_tokens:
            raise ValueError(f"batch: {ends[-1]} new tokens, the call is for {self.max_tokens}")
        if self.kernel == "append":
            slots = np.full(self.max_tokens, -1, np.int32)
            slots[: ends[-1]] = self._slots(batch, table)
            return *cache, None, None, slots
        starts[1 : len(ends) + 1] = ends
        starts[len(ends) + 1 :] = ends[-1]
        if self.kernel == "jax_ragged":
            cache = [None]
        return None, *cache, kv_lens, table, starts, np.asarray([len(batch.kv_lens)], np.int32)

    def _slots(self, batch: Batch, table: np.ndarray) -> list[int]:
        return [
            int(table[sequence, position // self.page_size]) * self.page_size + position % self.page_size
            for sequence, (kv_len, new) in enumerate(zip(batch.kv_lens, batch.new_tokens, strict=True))
            for position in range(kv_len - new, kv_len)
        ]

    def useful_bytes(self, batch: Batch) -> int:
        """Bytes of keys and values (and scales) that the batch's queries see, or that are written."""
        each = bytes_per_token(self.num_kv_heads, self.head_dim, self.kv_dtype)
        if self.kernel == "append":
            return each * sum(batch.new_tokens)
        window = self.sliding_window
        return each * sum(
            kv_len if window is None else min(kv_len, window + new - 1)
            for kv_len, new in zip(batch.kv_lens, batch.new_tokens, strict=True)
        )

    def useful_flops(self, batch: Batch) -> int:
        """Floating-point operations of the two products, for pairs of query and token that are not masked."""
        if self.kernel == "append":
            return 0
        window = self.sliding_window or max(batch.kv_lens)
        pairs = sum(
            min(kv_len - i, window)
            for kv_len, new in zip(batch.kv_lens, batch.new_tokens, strict=True)
            for i in range(new)
        )
        return 4 * self.num_q_heads * self.head_dim * pairs
