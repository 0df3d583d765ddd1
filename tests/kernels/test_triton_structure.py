"""What the kernels for GPUs go over: as many programs as fill the chip, and no block that nobody sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.kernels import (
    TritonDecodeBlocks,
    TritonRaggedBlocks,
    empty_kv_pages,
    paged_decode_attention,
    ragged_paged_attention,
)
from vsurge.kernels.decode.triton import cut
from vsurge.kernels.gpu import attend

MULTIPROCESSORS = 132  # of an H200
BLOCK, PAGE, WIDTH = 64, 16, 40  # tokens of a block and of a page, pages of a sequence
Visits = Counter[tuple[int, int, bool]]  # sequence, block, and whether it needed masks, of the first KV head


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Visits]:
    """What interpreted kernels visit from now on."""
    if jax.default_backend() == "gpu":
        pytest.skip("compiled kernels tell nobody what they visit")
    found: Visits = Counter()
    load = attend._load

    def note(sequence: Any, head: Any, place: Any, masked: Any) -> None:
        if head == 0:
            found[int(sequence), int(place) // BLOCK, bool(masked)] += 1

    def load_and_note(geometry: Any, cache: Any, sequence: Any, head: Any, places: Any, read: Any) -> Any:
        jax.debug.callback(note, sequence, head, places[0], read is not None)
        return load(geometry, cache, sequence, head, places, read)

    jax.clear_caches()  # what was traced before does not tell
    monkeypatch.setattr(attend, "_load", load_and_note)
    yield found
    jax.clear_caches()


def run_ragged(kv_lens: list[int], new: list[int], **options: Any) -> None:
    cache = empty_kv_pages(len(kv_lens) * WIDTH, PAGE, 2, 16, "float32")
    table = jnp.arange(len(kv_lens) * WIDTH, dtype=jnp.int32).reshape(-1, WIDTH)
    starts = jnp.asarray(np.cumsum([0, *new]), jnp.int32)
    output = ragged_paged_attention(
        jnp.ones((sum(new), 4, 16)), cache, jnp.asarray(kv_lens, jnp.int32), table, starts,
        jnp.asarray([len(new)], jnp.int32), scale=1.0, implementation="triton",
        block_sizes=TritonRaggedBlocks(rows=128, kv_tokens=BLOCK), **options,
    )  # fmt: skip
    jax.block_until_ready(output)
    jax.effects_barrier()


def test_prompts_visit_the_blocks_up_to_each_block_of_queries(visits: Visits) -> None:
    """Query blocks have 64 tokens as well: the one on the diagonal is masked, those before it are not."""
    run_ragged([299, 500], [299, 64])
    wanted: Visits = Counter()
    for block in range(5):  # of the first sequence's queries, the last of 43
        wanted.update((0, before, False) for before in range(block))
        wanted[0, block, True] += 1
    # positions 436 to 499: the first sees the blocks up to the sixth whole, and part of the seventh
    wanted.update((1, before, False) for before in range(436 // BLOCK))
    wanted.update((1, block, True) for block in range(436 // BLOCK, 8))
    assert visits == wanted


def test_prompts_skip_the_blocks_before_the_window(visits: Visits) -> None:
    run_ragged([640], [64], sliding_window=100)
    assert sorted(block for _, block, _ in visits.elements()) == [(640 - 64 - 100 + 1) // BLOCK, 8, 9]


def test_decoding_visits_each_block_that_is_seen_once(visits: Visits) -> None:
    lengths = [500, 1, 0, 129]
    cache = empty_kv_pages(4 * WIDTH, PAGE, 2, 16, "float32")
    table = jnp.arange(4 * WIDTH, dtype=jnp.int32).reshape(4, WIDTH)
    output = paged_decode_attention(
        jnp.ones((4, 4, 16)), cache, jnp.asarray(lengths, jnp.int32), table, scale=1.0, sliding_window=200,
        implementation="triton", block_sizes=TritonDecodeBlocks(kv_tokens=BLOCK, programs=8),
    )  # fmt: skip
    jax.block_until_ready(output)
    jax.effects_barrier()
    seen = [(0, 4), (0, 5), (0, 6), (0, 7), (1, 0), (3, 0), (3, 1), (3, 2)]  # of the first from 300 on
    assert sorted((sequence, block) for sequence, block, _ in visits.elements()) == seen


@pytest.mark.parametrize("num_kv_heads", [1, 8])
@pytest.mark.parametrize(("num_seqs", "context"), [(1, 65536), (256, 512)])
def test_few_long_sequences_make_as_many_programs_as_many_short_ones(
    num_seqs: int, context: int, num_kv_heads: int
) -> None:
    """Three at least for each multiprocessor; and parts are as long as the sequences together."""
    blocks = TritonDecodeBlocks()
    lengths = np.full(num_seqs, context)
    most = blocks.programs // num_kv_heads
    cut_up = jax.jit(partial(cut, num_queries=1, window=None, most=most, block=blocks.kv_tokens))
    parts = cut_up(jnp.asarray(lengths, jnp.int32))
    sequence, first, end, starts = (np.asarray(part) for part in parts)
    used = end > first
    assert used.sum() * num_kv_heads >= 3 * MULTIPROCESSORS
    assert used.sum() == starts[-1]
    covered = np.zeros(num_seqs, int)
    np.add.at(covered, sequence[used], (end - first)[used])
    np.testing.assert_array_equal(covered, lengths)
