"""What a search for block sizes tries, and the lengths that it tries them on."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import jax.numpy as jnp
import numpy as np

from ..decode import DecodeBlocks
from ..decode import blocks as decode_blocks
from ..decode.rows import seq_bytes
from ..ragged import RaggedBlocks
from ..ragged import blocks as ragged_blocks
from ..tpu.fetcher import vmem_bytes_per_token
from ..tpu.shapes import LANES
from ..tpu.units import most_seqs
from .calls import Batch, Call
from .chips import find_chip
from .compiler import target

Blocks = DecodeBlocks | RaggedBlocks

SEQUENCES = 64  # that decode together
NEW_TOKENS = 2048  # of a step with prompts
SHORTEST = 128  # tokens of a sequence, where lengths are drawn
PIPELINED_US = 0.5  # of copies that must at least be under way, or latency decides
MOST_SEQS = 64  # of a group
# Beside the heuristic's: where searches on v5e, v6e and 7x found their winners.
FEW_OF_DECODE = {(256, 4, 4), (256, 4, 8), (256, 8, 4), (512, 2, 4), (512, 8, 4), (1024, 1, 4)}


def workloads(kernel: str, context: int) -> tuple[Batch, ...]:
    """The batches by whose predicted times block sizes for a context are compared.

    Args:
        kernel: "decode": 64 sequences of `context` tokens; and of lengths drawn log-uniform up to it.
            "ragged": 2,048 new tokens of sequences that have `context` tokens then, or are as long; and of
            prompts of lengths drawn log-uniform up to it.
        context: tokens.
    """
    if kernel == "decode":
        return Batch((context,) * SEQUENCES), Batch(_drawn(context, SEQUENCES))
    new = min(context, NEW_TOKENS)
    count = NEW_TOKENS // new
    lengths, left = list[int](), NEW_TOKENS
    for length in _drawn(new, SEQUENCES):
        if length <= left:
            lengths.append(length)
            left -= length
    return Batch((context,) * count, (new,) * count), Batch(tuple(lengths), tuple(lengths))


def _drawn(longest: int, count: int) -> tuple[int, ...]:
    """Lengths drawn log-uniform, the same ones each time."""
    low, high = np.log(min(SHORTEST, longest)), np.log(longest)
    return tuple(np.exp(np.random.default_rng(0).uniform(low, high, count)).round().astype(int).tolist())


def candidates(call: Call, chip: str, *, few: bool = False) -> list[Blocks]:
    """Block sizes worth compiling for a call, those of the heuristic first.

    Args:
        call: "decode" or "ragged".
        chip: one of `CHIPS`.
        few: a handful.
    """
    vmem_bytes = find_chip(chip).vmem_mib * 2**20
    found = _of_decode(call, chip, vmem_bytes) if call.kernel == "decode" else _of_ragged(call, vmem_bytes)
    if few:
        kept = _few_of_decode if call.kernel == "decode" else _few_of_ragged
        found = [found[0], *(blocks for blocks in found if kept(blocks, found[0]))]
    return list(dict.fromkeys(found))


def chosen_ragged_blocks(call: Call, chip: str) -> RaggedBlocks:
    """What the kernel chooses for a "ragged" call on a chip: of the tables, or the heuristic's."""
    with target(chip):
        return ragged_blocks.tuned_or_default_blocks(
            call.key,
            _sizes(call, return_lse=False),
            pages_per_seq=call.pages_per_seq,
            vmem_bytes=find_chip(chip).vmem_mib * 2**20,
        )


def chosen_decode_blocks(call: Call, chip: str) -> DecodeBlocks:
    """As `chosen_ragged_blocks`, for a "decode" call."""
    with target(chip):
        return decode_blocks.tuned_or_default_blocks(
            call.key, **_decode_sizes(call), vmem_bytes=find_chip(chip).vmem_mib * 2**20
        )


def claimed_bytes(call: Call, chip: str) -> int:
    """Bytes of vector memory that a call's kernel takes by its own account, spilled registers aside."""
    if call.kernel == "ragged":
        return chosen_ragged_blocks(call, chip).scratch_bytes(_sizes(call, return_lse=False))
    sizes = _decode_sizes(call)
    return chosen_decode_blocks(call, chip).scratch_bytes(sizes["token_bytes"], sizes["seq_bytes"])


def _decode_sizes(call: Call) -> dict[str, int]:
    return {
        "page_size": call.page_size,
        "num_kv_heads": call.num_kv_heads,
        "pages_per_seq": call.pages_per_seq,
        "most_seqs": most_seqs(call.pages_per_seq, call.max_seqs),
        "token_bytes": vmem_bytes_per_token(call.cache()),
        "seq_bytes": seq_bytes(call.num_q_heads, call.head_dim, jnp.dtype(call.query_dtype).itemsize),
    }


def _few_of_decode(blocks: Blocks, _: Blocks) -> bool:
    assert isinstance(blocks, DecodeBlocks)
    return (blocks.kv_tokens, blocks.lanes, blocks.depth) in FEW_OF_DECODE


def _few_of_ragged(blocks: Blocks, first: Blocks) -> bool:
    """Whether block sizes differ from the first ones by twice the queries, and nothing else."""
    assert isinstance(blocks, RaggedBlocks)
    assert isinstance(first, RaggedBlocks)
    return blocks == replace(first, q_tokens=2 * first.q_tokens)


def _of_decode(call: Call, chip: str, vmem_bytes: int) -> list[Blocks]:
    known = find_chip(chip)
    token_bytes = vmem_bytes_per_token(call.cache())
    default = decode_blocks.default_blocks(**_decode_sizes(call), vmem_bytes=vmem_bytes)
    least = math.lcm(LANES, call.page_size)
    pipelined = PIPELINED_US * known.gbytes_per_s * 1e3
    found: list[Blocks] = [default]
    for kv_tokens, lanes, depth in product((256, 512, 1024), (1, 2, 4, 8, 16), (4, 8, 16)):
        unit_bytes = kv_tokens * token_bytes
        if (
            kv_tokens % least == 0
            and lanes * depth <= MOST_SEQS
            and depth * lanes * unit_bytes <= vmem_bytes * 5 // 8
            and (depth - 1) * lanes * unit_bytes >= pipelined
        ):
            found.append(DecodeBlocks(kv_tokens, lanes=lanes, depth=depth))
    return found


def _of_ragged(call: Call, vmem_bytes: int) -> list[Blocks]:
    sizes = _sizes(call, return_lse=True)  # so that what is found serves calls that want it
    default = ragged_blocks.default_blocks(sizes, pages_per_seq=call.pages_per_seq, vmem_bytes=vmem_bytes)
    found: list[Blocks] = [default]
    for q_times, kv_times, depth in product((1, 2, 0.5), (1, 2, 0.5), (default.depth, 2, 3)):
        blocks = replace(
            default,
            q_tokens=int(default.q_tokens * q_times),
            kv_tokens=int(default.kv_tokens * kv_times),
            depth=depth,
        )
        try:
            blocks.check(sizes, vmem_bytes)
        except ValueError:
            continue
        if blocks.scratch_bytes(sizes) + blocks.step_bytes(sizes) <= vmem_bytes * 7 // 8:
            found.append(blocks)
    return found


def _sizes(call: Call, *, return_lse: bool) -> ragged_blocks.Sizes:
    return ragged_blocks.Sizes(
        call.num_q_heads,
        call.num_kv_heads,
        call.head_dim,
        call.page_size,
        jnp.dtype(call.query_dtype).itemsize,
        vmem_bytes_per_token(call.cache()),
        return_lse,
    )
