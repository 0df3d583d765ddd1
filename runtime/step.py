"""What one step is: the inputs that the host sends for it, and the function that is compiled.

A step's tokens stay on the device, one per row of the batch, and are the next step's input; the host only
reads copies of them.
"""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Int

from ..kernels import KVPages
from ..model import Batch, Params, Qwen3Config, forward
from .sampling import MAX_BANNED, SamplingInputs, sample
from .scheduler import Chunk, StepPlan

if TYPE_CHECKING:
    Leaf = jax.Array
else:  # a leaf may also be a NumPy array or a ShapeDtypeStruct
    Leaf = Any

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


def step_inputs(
    plan: StepPlan, bucket: int, *, num_rows: int, max_prompts: int, pages_per_seq: int
) -> StepInputs:
    """A step's inputs as NumPy arrays, padded to its bucket.

    Args:
        plan: what runs.
        bucket: sequences of a decode step, or tokens of a prefill step.
        num_rows: of the batch.
        max_prompts: sequences of a prefill step.
        pages_per_seq: length of a row of the page table.
    """
    n = bucket if plan.kind == "decode" else max_prompts
    rows = np.full(n, num_rows, np.int32)
    kv_lens = np.zeros(n, np.int32)
    page_table = np.zeros((n, pages_per_seq), np.int32)
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
