"""What one step is: the inputs that the host sends for it, and the function that is compiled.

A step's tokens stay on the device, one per row of the batch, and are the next step's input; the host only
reads copies of them.
"""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from ..kernels import KVPages
from ..model import Batch, Params, Qwen3Config, forward
from .rows import Rows
from .sampling import SamplingInputs, sample
from .scheduler import StepPlan

if TYPE_CHECKING:
    Leaf = jax.Array
else:  # a leaf may also be a NumPy array or a ShapeDtypeStruct
    Leaf = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """What the host sends for a step. Rows beyond those in use are padding: no tokens, no row of the batch.

    Attributes:
        rows: [n] int32, which row of the batch each sequence is; num_rows for none.
        kv_lens: [n] int32, tokens in the cache after this step, or after the first of several decode steps.
        page_table: [n, pages_per_seq] int32.
        sampling: how to sample each sequence's token.
        ends: [n] int32, tokens in the cache after the last decode step; None in a mixed step.
        token_ids: [num_tokens] int32; -1 stands for the row's last token, which is on the device. None in a
            decode step, where all of them are.
        query_starts: [n + 1] int32; None in a decode step.
        num_seqs: [1] int32; None in a decode step.
        samples: [n] bool, whether the sequence's token is its next one; None in a decode step.
    """

    rows: Leaf
    kv_lens: Leaf
    page_table: Leaf
    sampling: SamplingInputs
    ends: Leaf | None = None
    token_ids: Leaf | None = None
    query_starts: Leaf | None = None
    num_seqs: Leaf | None = None
    samples: Leaf | None = None


def step_inputs(plan: StepPlan, bucket: int, rows: Rows, *, max_seqs: int) -> StepInputs:
    """A step's inputs as NumPy arrays, padded to its bucket.

    Args:
        plan: what runs.
        bucket: sequences of a decode step, or tokens of a mixed step.
        rows: what is known of the rows.
        max_seqs: sequences of a mixed step.
    """
    chunks = plan.chunks
    n = bucket if plan.kind == "decode" else max_seqs
    of_row = rows.of(chunks, n)
    ends = np.zeros(n, np.int32)
    ends[: len(chunks)] = [chunk.start + chunk.length for chunk in chunks]
    if plan.kind == "decode":
        kv_lens = np.zeros(n, np.int32)
        kv_lens[: len(chunks)] = [chunk.start + 1 for chunk in chunks]
        return StepInputs(
            of_row, kv_lens, rows.page_table(of_row), rows.sampling(of_row, kv_lens), ends=ends  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    token_ids = np.zeros(bucket, np.int32)
    query_starts = np.zeros(n + 1, np.int32)
    samples = np.zeros(n, np.bool_)
    end = 0
    for i, chunk in enumerate(chunks):
        start, end = end, end + chunk.length
        if chunk.is_decode:
            token_ids[start] = -1
        else:
            token_ids[start:end] = chunk.request.known_tokens(chunk.start, chunk.start + chunk.length)
        query_starts[i + 1] = end
        samples[i] = chunk.num_outputs > 0
    query_starts[len(chunks) + 1 :] = end
    return StepInputs(
        of_row,  # pyright: ignore[reportArgumentType]
        ends,  # pyright: ignore[reportArgumentType]
        rows.page_table(of_row),  # pyright: ignore[reportArgumentType]
        rows.sampling(of_row, ends),
        token_ids=token_ids,  # pyright: ignore[reportArgumentType]
        query_starts=query_starts,  # pyright: ignore[reportArgumentType]
        num_seqs=np.array([len(chunks)], np.int32),  # pyright: ignore[reportArgumentType]
        samples=samples,  # pyright: ignore[reportArgumentType]
    )


def step(
    params: Params,
    kv_pages: tuple[KVPages, ...],
    last_tokens: Int[Array, " num_rows"],
    inputs: StepInputs,
    *,
    config: Qwen3Config,
    decode_steps: int,
) -> tuple[Int[Array, "steps n"], tuple[KVPages, ...], Int[Array, " num_rows"]]:
    """One mixed step, or some decode steps: the tokens chosen, and cache and last tokens after it."""
    page_size = kv_pages[0].page_size
    if inputs.samples is not None:
        logits, kv_pages = forward(params, config, _mixed_batch(inputs, last_tokens, page_size), kv_pages)
        tokens = sample(logits, inputs.sampling)
        return tokens[None], kv_pages, _kept(last_tokens, inputs.rows, tokens, inputs.samples)

    assert inputs.ends is not None
    ends = jnp.asarray(inputs.ends)

    def decode(j: Array, state: Any) -> Any:
        tokens, kv_pages, last_tokens = state
        kv_lens = jnp.minimum(inputs.kv_lens + j, ends)
        runs = (kv_lens == inputs.kv_lens + j) & (kv_lens > 0)
        batch = _decode_batch(inputs, kv_lens, runs, last_tokens, page_size)
        logits, kv_pages = forward(params, config, batch, kv_pages)
        chosen = sample(logits, replace(inputs.sampling, position=kv_lens))
        return tokens.at[j].set(chosen), kv_pages, _kept(last_tokens, inputs.rows, chosen, runs)

    state = jnp.zeros((decode_steps, inputs.rows.shape[0]), jnp.int32), kv_pages, last_tokens
    if decode_steps == 1:
        return decode(jnp.int32(0), state)
    return cast(Any, lax.fori_loop(0, decode_steps, decode, state))


def _kept(last_tokens: Array, rows: Array, tokens: Array, which: Array) -> Array:
    """The rows' last tokens, after some of the sequences got another one."""
    return last_tokens.at[jnp.where(which, rows, last_tokens.shape[0])].set(tokens, mode="drop")


def _decode_batch(
    inputs: StepInputs, kv_lens: Array, runs: Array, last_tokens: Array, page_size: int
) -> Batch:
    sequence = jnp.arange(inputs.rows.shape[0], dtype=jnp.int32)
    positions = jnp.maximum(kv_lens - 1, 0)
    slots = _slots(inputs.page_table, sequence, positions, page_size)
    return Batch(
        token_ids=last_tokens.at[inputs.rows].get(mode="clip"),
        positions=positions,
        slots=jnp.where(runs, slots, -1),
        kv_lens=kv_lens,
        page_table=inputs.page_table,
    )


def _mixed_batch(inputs: StepInputs, last_tokens: Array, page_size: int) -> Batch:
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
    on_device = last_tokens.at[inputs.rows[sequence]].get(mode="clip")
    return Batch(
        token_ids=jnp.where(inputs.token_ids < 0, on_device, inputs.token_ids),
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
