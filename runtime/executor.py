"""Runs planned steps on the device: one compiled program per bucket, and nothing is compiled while serving.

A step's tokens stay on the device, one per row of the batch, and are the next step's input; the host only
reads copies of them.
"""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Int

from ..kernels import KVPages, empty_kv_pages
from ..model import Batch, Model, Params, Qwen3Config, forward
from ..model.progress import progress_bar
from .cache_size import page_bytes
from .errors import OutOfMemory
from .sampling import MAX_BANNED, SamplingInputs, sample
from .scheduler import Chunk, StepKind, StepPlan

if TYPE_CHECKING:
    Leaf = jax.Array
else:  # a leaf may also be a NumPy array or a ShapeDtypeStruct
    Leaf = Any

MAX_PROGRAMS = 16
SMALLEST_PREFILL = 64  # tokens
# LLVM's first level of optimization instead of its highest: a quarter less time to compile and, measured on
# Qwen3-0.6B, steps no slower, for the matrix products are library calls.
CPU_COMPILER_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 1}
LARGEST_FLOAT, LARGEST_INT = float(np.finfo(np.float32).max), int(np.iinfo(np.int32).max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """What the host sends for a step. Rows beyond those in use are padding: no tokens, no row of the batch.

    Attributes:
        rows: [n] int32, which row of the batch each sequence is; num_rows for none (its token goes nowhere).
        kv_lens: [n] int32, tokens in the cache after this step.
        page_table: [n, pages_per_seq] int32.
        sampling: how to sample each sequence's token.
        token_ids: [num_tokens] int32, the prompts' tokens; None in a decode step: they are on the device.
        query_starts: [n + 1] int32; None in a decode step.
        num_seqs: [1] int32; None in a decode step.
    """

    rows: Leaf
    kv_lens: Leaf
    page_table: Leaf
    sampling: SamplingInputs
    token_ids: Leaf | None = None
    query_starts: Leaf | None = None
    num_seqs: Leaf | None = None


def step(
    params: Params,
    kv_pages: tuple[KVPages, ...],
    last_tokens: Int[Array, " num_rows"],
    inputs: StepInputs,
    *,
    config: Qwen3Config,
) -> tuple[Int[Array, " n"], tuple[KVPages, ...], Int[Array, " num_rows"]]:
    """One step: the tokens it chose, and the cache and last tokens after it."""
    page_size = kv_pages[0].page_size
    if inputs.token_ids is None:
        batch = _decode_batch(inputs, last_tokens, page_size)
    else:
        batch = _prefill_batch(inputs, page_size)
    logits, kv_pages = forward(params, config, batch, kv_pages)
    tokens = sample(logits, inputs.sampling)
    return tokens, kv_pages, last_tokens.at[inputs.rows].set(tokens, mode="drop")


def _decode_batch(inputs: StepInputs, last_tokens: Array, page_size: int) -> Batch:
    sequence = jnp.arange(inputs.rows.shape[0], dtype=jnp.int32)
    positions = jnp.maximum(inputs.kv_lens - 1, 0)
    slots = _slots(inputs.page_table, sequence, positions, page_size)
    return Batch(
        token_ids=last_tokens.at[inputs.rows].get(mode="clip"),
        positions=positions,
        slots=jnp.where(inputs.kv_lens > 0, slots, -1),
        kv_lens=inputs.kv_lens,
        page_table=inputs.page_table,
    )


def _prefill_batch(inputs: StepInputs, page_size: int) -> Batch:
    assert inputs.token_ids is not None
    assert inputs.query_starts is not None
    starts = inputs.query_starts
    token = jnp.arange(inputs.token_ids.shape[0], dtype=jnp.int32)
    sequence = jnp.sum(
        (starts[None, 1:] <= token[:, None]).astype(jnp.int32), axis=1
    )  # starts of padding: the end
    used = sequence < starts.shape[0] - 1
    sequence = jnp.where(used, sequence, 0)
    positions = token - starts[sequence + 1] + inputs.kv_lens[sequence]
    positions = jnp.where(used, positions, 0)
    return Batch(
        token_ids=inputs.token_ids,
        positions=positions,
        slots=jnp.where(used, _slots(inputs.page_table, sequence, positions, page_size), -1),
        kv_lens=inputs.kv_lens,
        page_table=inputs.page_table,
        query_starts=starts,
        num_seqs=inputs.num_seqs,
        logit_rows=jnp.maximum(starts[1:] - 1, 0),
    )


def _slots(page_table: Array, sequence: Array, positions: Array, page_size: int) -> Array:
    return page_table[sequence, positions // page_size] * page_size + positions % page_size


def default_buckets(smallest: int, largest: int, limit: int) -> tuple[int, ...]:
    """Sizes from smallest to largest, doubling, or by a larger factor where that would make too many."""
    sizes: list[int] = []
    for ratio in (2, 4, 8, 16):
        sizes = [largest]
        while sizes[-1] > smallest:
            sizes.append(max(smallest, -(-sizes[-1] // ratio)))
        if len(sizes) <= limit:
            break
    return tuple(sorted(sizes))


class Executor:
    """Holds the cache, and runs steps.

    Args:
        model: shape and weights.
        num_pages, page_size: the cache.
        max_length: longest sequence, tokens; bounds the page table.
        max_concurrent_decodes: rows of the batch.
        max_concurrent_prefill: prompts in one prefill step.
        prefill_lengths: sizes of prefill steps, tokens, in order; None for a default choice.
        max_prefill_length: the largest of them.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_pages: int,
        page_size: int,
        max_length: int,
        max_concurrent_decodes: int,
        max_concurrent_prefill: int,
        max_prefill_length: int,
        prefill_lengths: Sequence[int] | None,
    ) -> None:
        self._model = model
        self._num_pages, self._page_size = num_pages, page_size
        self._pages_per_seq = -(-max_length // page_size)
        self._num_rows = max_concurrent_decodes
        self._max_prompts = max_concurrent_prefill
        self.decode_buckets = default_buckets(min(2, self._num_rows), self._num_rows, MAX_PROGRAMS // 2)
        self.prefill_buckets = tuple(prefill_lengths or ()) or default_buckets(
            min(SMALLEST_PREFILL, max_prefill_length),
            max_prefill_length,
            MAX_PROGRAMS - len(self.decode_buckets),
        )
        self._programs: dict[tuple[StepKind, int], jax.stages.Compiled] = {}
        self._kv_pages: tuple[KVPages, ...] = ()
        self._last_tokens: jax.Array | None = None

    def allocate(self) -> None:
        """Makes an empty cache on the device.

        Raises:
            OutOfMemory: there is no room for it.
        """
        try:
            self._kv_pages = self._empty_cache()
            self._last_tokens = jnp.zeros(self._num_rows, jnp.int32)
            jax.block_until_ready((self._kv_pages, self._last_tokens))
        except RuntimeError as error:  # jax.errors.JaxRuntimeError
            self.release()
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            num_bytes = self._num_pages * page_bytes(self._model, self._page_size)
            raise OutOfMemory(
                f"num_pages={self._num_pages}: a cache of {num_bytes / 2**30:.2f} GiB does not fit, at "
                f"{num_bytes // self._num_pages} bytes a page of {self._page_size} tokens; use fewer pages"
            ) from error

    def _empty_cache(self) -> tuple[KVPages, ...]:
        config = self._model.config
        return tuple(
            empty_kv_pages(
                self._num_pages, self._page_size, config.num_kv_heads, config.head_dim, config.cache_dtype
            )
            for _ in range(config.num_layers)
        )

    def release(self) -> None:
        """Gives the cache's memory back; the compiled programs stay."""
        self._kv_pages, self._last_tokens = (), None

    def compile(self, *, show_progress: bool) -> None:
        """Compiles the program of every bucket that is not compiled yet, several at a time.

        Only this thread traces and lowers, which is Python; the others are XLA's.
        """
        buckets: dict[StepKind, tuple[int, ...]] = {
            "decode": self.decode_buckets,
            "prefill": self.prefill_buckets,
        }
        wanted: list[tuple[StepKind, int]] = [(k, size) for k, sizes in buckets.items() for size in sizes]
        missing = [key for key in wanted if key not in self._programs]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            futures = [pool.submit(self._compile_lowered, self._lower(*key)) for key in missing]
            for key, future in zip(
                progress_bar(missing, "compiling", show=show_progress, unit="program"), futures, strict=True
            ):
                self._programs[key] = future.result()
        _return_freed_memory()

    def _lower(self, kind: StepKind, size: int) -> jax.stages.Lowered:
        kv_pages = jax.eval_shape(self._empty_cache)
        last_tokens = jax.ShapeDtypeStruct((self._num_rows,), jnp.int32)
        inputs = jax.eval_shape(partial(self._inputs, StepPlan(kind, ()), size))
        jitted = jax.jit(partial(step, config=self._model.config), donate_argnums=(1, 2))
        return jitted.lower(self._model.params, kv_pages, last_tokens, inputs)

    def _compile_lowered(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        platform = self._model.mesh.devices.flat[0].platform
        return lowered.compile(CPU_COMPILER_OPTIONS if platform == "cpu" else None)

    def run(self, plan: StepPlan) -> jax.Array:
        """Dispatches a step; the tokens it chooses, on the device, one per chunk and then padding."""
        if self._last_tokens is None:
            raise RuntimeError("the executor has no cache: allocate() first")
        size = sum(chunk.length for chunk in plan.chunks)
        buckets = self.decode_buckets if plan.kind == "decode" else self.prefill_buckets
        bucket = next(b for b in buckets if b >= size)
        if (plan.kind, bucket) not in self._programs:
            self._programs[plan.kind, bucket] = self._compile_lowered(self._lower(plan.kind, bucket))
        tokens, self._kv_pages, self._last_tokens = self._programs[plan.kind, bucket](
            self._model.params, self._kv_pages, self._last_tokens, self._inputs(plan, bucket)
        )
        tokens.copy_to_host_async()
        return tokens

    def _inputs(self, plan: StepPlan, bucket: int) -> StepInputs:
        """A step's inputs as NumPy arrays, padded to its bucket."""
        n = bucket if plan.kind == "decode" else self._max_prompts
        rows = np.full(n, self._num_rows, np.int32)
        kv_lens = np.zeros(n, np.int32)
        page_table = np.zeros((n, self._pages_per_seq), np.int32)
        for i, chunk in enumerate(plan.chunks):
            if chunk.completes:
                rows[i] = chunk.request.row
            kv_lens[i] = chunk.start + chunk.length
            page_table[i, : len(chunk.request.pages)] = chunk.request.pages
        sampling = sampling_inputs(plan.chunks, n, kv_lens)
        if plan.kind == "decode":
            return StepInputs(rows, kv_lens, page_table, sampling)  # pyright: ignore[reportArgumentType]
        token_ids = np.zeros(bucket, np.int32)
        query_starts = np.zeros(n + 1, np.int32)
        end = 0
        for i, chunk in enumerate(plan.chunks):
            token_ids[end : end + chunk.length] = chunk.request.prompt_ids[
                chunk.start : chunk.start + chunk.length
            ]
            end += chunk.length
            query_starts[i + 1] = end
        query_starts[len(plan.chunks) + 1 :] = end
        num_seqs = np.array([len(plan.chunks)], np.int32)
        return StepInputs(  # pyright: ignore[reportCallIssue]
            rows, kv_lens, page_table, sampling, token_ids, query_starts, num_seqs  # pyright: ignore[reportArgumentType]
        )  # fmt: skip


def _return_freed_memory() -> None:
    """To the system: glibc would keep what the compiler freed, a quarter of a GiB after eight programs."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other C libraries have none
        if trim is not None:
            trim(0)


def sampling_inputs(chunks: Sequence[Chunk], n: int, positions: npt.NDArray[np.int32]) -> SamplingInputs:
    """The sampling parameters of n rows, the first ones being the chunks'; the rest is greedy.

    Values beyond the range of float32 or int32, which mean nothing more there, become the largest of it.
    """
    temperature, top_p, min_p = np.zeros(n, np.float32), np.ones(n, np.float32), np.zeros(n, np.float32)
    top_k = np.zeros(n, np.int32)
    seed = np.zeros((n, 2), np.uint32)
    banned = np.full((n, MAX_BANNED), -1, np.int32)
    for i, chunk in enumerate(chunks):
        request = chunk.request
        params = request.params
        temperature[i] = min(params.temperature, LARGEST_FLOAT)
        top_p[i], min_p[i] = params.top_p, params.min_p
        top_k[i] = min(max(params.top_k, 0), LARGEST_INT)
        seed[i] = request.seed >> 32, request.seed & 0xFFFFFFFF
        if not request.may_stop_at(chunk.output_index):
            banned[i, : len(request.stop_token_ids)] = sorted(request.stop_token_ids)
    return SamplingInputs(temperature, top_k, top_p, min_p, seed, positions, banned)  # pyright: ignore[reportArgumentType]
