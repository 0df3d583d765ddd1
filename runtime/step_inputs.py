"""What the host sends for a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
import numpy.typing as npt

from .leaf import Leaf
from .logprobs import SCORED_TOGETHER
from .rows import Rows
from .sampling import SamplingInputs
from .shaping import ShapingInputs
from .step_plan import Chunk, StepKind


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """What the host sends for a step. Rows beyond those in use are padding: no tokens, no row of the batch.

    For several replicas each array is what it is for the first one, behind it that of the second, and so on.

    Attributes:
        rows: [n] int32, which row of the batch each sequence is; num_rows for none.
        kv_lens: [n] int32, tokens in the cache after this step, or after the first of several decode steps.
        page_table: [n, pages_per_seq] int32.
        sampling: how to sample each sequence's token.
        shaping: what is done to its logits before.
        wants_logprobs: [n] bool, whether the log-probabilities of its token are wanted.
        ends: [n] int32, tokens in the cache after the last decode step; None in a mixed step.
        token_ids: [num_tokens] int32; -1 stands for the row's last token, which is on the device. None in a
            decode step, where all of them are.
        query_starts: [n + 1] int32; None in a decode step.
        num_seqs: [1] int32; None in a decode step.
        num_found: [n] int32, tokens of the sequence that are in the cache and not to be written; None in a
            decode step, where all tokens are new.
        samples: [n] bool, whether the sequence's token is its next one; None in a decode step.
        scored, targets: [num_tokens, filled up to whole SCORED_TOGETHER] int32, which of the step's tokens
            are to be scored, and by which token that follows; None in a decode step.
        num_scored: [1] int32, how many those are; None in a decode step.
    """

    rows: Leaf
    kv_lens: Leaf
    page_table: Leaf
    sampling: SamplingInputs
    shaping: ShapingInputs
    wants_logprobs: Leaf
    ends: Leaf | None = None
    token_ids: Leaf | None = None
    query_starts: Leaf | None = None
    num_seqs: Leaf | None = None
    num_found: Leaf | None = None
    samples: Leaf | None = None
    scored: Leaf | None = None
    targets: Leaf | None = None
    num_scored: Leaf | None = None


def step_inputs(
    kind: StepKind, chunks: Sequence[Chunk], bucket: int, rows: Rows, *, max_seqs: int
) -> StepInputs:
    """A replica's inputs of a step as NumPy arrays, padded to its bucket.

    Args:
        kind: of the step.
        chunks: what the replica runs of it.
        bucket: sequences of a decode step, or tokens of a mixed step.
        rows: what is known of the replica's rows.
        max_seqs: sequences of a mixed step.
    """
    n = bucket if kind == "decode" else max_seqs
    of_row = rows.of(chunks, n)
    ends = np.zeros(n, np.int32)
    ends[: len(chunks)] = [chunk.start + chunk.length for chunk in chunks]
    if kind == "decode":
        kv_lens = np.zeros(n, np.int32)
        kv_lens[: len(chunks)] = [chunk.start + 1 for chunk in chunks]
        return StepInputs(
            of_row,  # pyright: ignore[reportArgumentType]
            kv_lens,  # pyright: ignore[reportArgumentType]
            rows.page_table(of_row),  # pyright: ignore[reportArgumentType]
            *rows.settings(of_row),  # pyright: ignore[reportArgumentType]
            ends=ends,  # pyright: ignore[reportArgumentType]
        )
    token_ids = np.zeros(bucket, np.int32)
    query_starts = np.zeros(n + 1, np.int32)
    num_found = np.zeros(n, np.int32)
    num_found[: len(chunks)] = [chunk.request.num_found for chunk in chunks]
    samples = np.zeros(n, np.bool_)
    scored: list[int] = []
    targets: list[int] = []
    end = 0
    for i, chunk in enumerate(chunks):
        start, end = end, end + chunk.length
        if chunk.is_decode:
            token_ids[start] = -1
        else:
            token_ids[start:end] = chunk.request.known_tokens(chunk.start, chunk.start + chunk.length)
        query_starts[i + 1] = end
        samples[i] = chunk.num_outputs > 0
        following = chunk.tokens_to_score
        scored += range(start, start + len(following))
        targets += following
    query_starts[len(chunks) + 1 :] = end
    return StepInputs(
        of_row,  # pyright: ignore[reportArgumentType]
        ends,  # pyright: ignore[reportArgumentType]
        rows.page_table(of_row),  # pyright: ignore[reportArgumentType]
        *rows.settings(of_row),  # pyright: ignore[reportArgumentType]
        token_ids=token_ids,  # pyright: ignore[reportArgumentType]
        query_starts=query_starts,  # pyright: ignore[reportArgumentType]
        num_seqs=np.array([len(chunks)], np.int32),  # pyright: ignore[reportArgumentType]
        num_found=num_found,  # pyright: ignore[reportArgumentType]
        samples=samples,  # pyright: ignore[reportArgumentType]
        scored=_filled(scored, bucket),  # pyright: ignore[reportArgumentType]
        targets=_filled(targets, bucket),  # pyright: ignore[reportArgumentType]
        num_scored=np.array([len(scored)], np.int32),  # pyright: ignore[reportArgumentType]
    )


def _filled(values: list[int], bucket: int) -> npt.NDArray[np.int32]:
    array = np.zeros(-(-bucket // SCORED_TOGETHER) * SCORED_TOGETHER, np.int32)
    array[: len(values)] = values
    return array
