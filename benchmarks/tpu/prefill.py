"""Prompts: the share of what the bare matrix products reach; and steps that mix them with decoding.

One head's two products wait for each other. Several heads' fill each other's waits, in the kernel as where
they are compiled alone: only that is a ceiling.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import jax

from ...kernels import RaggedBlocks
from ...kernels.tuning import Batch, Call, Compilers, Prediction
from ...kernels.tuning.bare import column_products, product_cycles, row_products
from ...kernels.tuning.calls import Kernel
from ...kernels.tuning.candidates import chosen_ragged_blocks
from ...kernels.tuning.chips import find_chip
from .decode import unless_it_stops
from .rows import Row

NEW = 2048  # tokens
CONTEXTS = {NEW: 0.75, 30 * 1024 + NEW: 0.8}  # context, the new tokens included: the least share
V6E_CEILING = 0.44  # of the matrix rate: one head's bare products with 512 queries and 1,024 tokens
HEADS = (32, 8)
SHARD, CACHED = (8, 2), 8192  # heads and context, where caches of 8 and of 16 bits are compared
BARE = (row_products, column_products)
ALONE = (1, HEADS[1])  # heads whose bare products are compiled together
THEIRS = (8, 32)  # pages and queries per block of jax's kernel, whose own tables have none for these pages;
# larger ones take minutes to compile


def prefill_rows(chip: str, compilers: Compilers) -> Iterator[Row]:
    """All rows about prompts on a chip; the compiling is begun at once."""
    calls = {context: _call("ragged", context) for context in CONTEXTS}
    blocks = {context: chosen_ragged_blocks(call, chip) for context, call in calls.items()}
    batches = {context: Batch((context,), (NEW,)) for context in CONTEXTS}
    ours = {c: compilers.predict(call, [batches[c]], chip) for c, call in calls.items()}
    bare = {
        (sizes, heads): [compilers.schedules_of(f, _tiles(sizes, heads), chip) for f in BARE]
        for sizes in set(blocks.values())
        for heads in ALONE
    }
    longest = max(CONTEXTS)
    their_call = replace(_call("jax_ragged", longest), block_sizes=THEIRS)
    theirs = compilers.predict(their_call, list(batches.values()), chip)
    quantized = [
        compilers.predict(_of_shard(kv_dtype), [Batch((CACHED,), (NEW,))], chip)
        for kv_dtype in ("bfloat16", "int8")
    ]
    mixed = _start_mixed(chip, compilers)
    known, their_predictions = find_chip(chip), unless_it_stops(theirs)
    for at, (context, least) in enumerate(CONTEXTS.items()):
        sizes = blocks[context]
        (prediction,) = ours[context].result()
        their = None if their_predictions is None else their_predictions[at]
        before = f", {context - NEW:,} before them" if context > NEW else ""
        yield Row(chip, f"prefill of {NEW:,} tokens{before}: MFU", "%", prediction.mfu, their and their.mfu,
            at_least=least * V6E_CEILING if chip == "v6e" else None)  # fmt: skip
        for heads, target in zip(ALONE, (least, None), strict=True):
            flops = _tile_flops(sizes, heads)
            cycles = min(product_cycles(future.result()[0], flops) for future in bare[sizes, heads])
            ceiling = flops * known.clock_ghz / cycles / 1e3 / known.tflops
            together = "one head's bare products" if heads == 1 else f"{heads} heads' bare products together"
            yield Row(chip, f"prefill of {NEW:,} tokens{before}: MFU over that of {together}, {ceiling:.1%}",
                "%", prediction.mfu / ceiling, their and their.mfu / ceiling, at_least=target,
                raw={"mfu": prediction.mfu, "bare_products": ceiling, "block_sizes": vars(sizes),
                     "time_us": prediction.time_us, "their_time_us": their and their.time_us,
                     "their_block_sizes": dict(zip(("pages", "q_tokens"), THEIRS, strict=True))})  # fmt: skip
    exact, rounded = (future.result()[0].time_us for future in quantized)
    yield Row(chip, f"{NEW:,} tokens at {CACHED:,}, {SHARD} heads: with an int8 cache over bfloat16", "x",
        rounded / exact, raw={"bfloat16_us": exact, "int8_us": rounded})  # fmt: skip
    both, prompt, decodes = (future.result()[0].time_us for future in mixed)
    yield Row(chip, "a prompt of 1,024 and 63 decodes at 2,048, over the sum of both alone", "x",
        both / (prompt + decodes), at_most=1.1,
        raw={"both_us": both, "prompt_us": prompt, "decodes_us": decodes})  # fmt: skip


def _call(kernel: Kernel, context: int) -> Call:
    return Call(kernel=kernel, num_q_heads=HEADS[0], num_kv_heads=HEADS[1], max_tokens=NEW,
        max_context=context)  # fmt: skip


def _of_shard(kv_dtype: str) -> Call:
    heads, kv_heads = SHARD
    call = replace(_call("ragged", CACHED), num_q_heads=heads, num_kv_heads=kv_heads)
    return replace(call, kv_dtype=kv_dtype)


def _tiles(sizes: RaggedBlocks, heads: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Queries, keys and values of some KV heads, as large as the kernel multiplies at once."""
    rows = sizes.q_tokens * HEADS[0] // HEADS[1]
    lengths = (rows, sizes.kv_tokens, sizes.kv_tokens)
    return tuple(jax.ShapeDtypeStruct((heads, n, 128), "bfloat16") for n in lengths)


def _tile_flops(sizes: RaggedBlocks, heads: int) -> int:
    return 4 * heads * sizes.q_tokens * HEADS[0] // HEADS[1] * sizes.kv_tokens * 128


def _start_mixed(chip: str, compilers: Compilers) -> list[Future[list[Prediction]]]:
    """Predictions of a mixed step, of its prompt alone and of its decodes alone."""
    prompt, decodes = (1024,), (2048,) * 63
    step = _call("ragged", 2048)
    alone = replace(step, kernel="decode")
    pairs: list[tuple[Call, Batch]] = [
        (step, Batch(prompt + decodes, prompt + (1,) * 63)),
        (step, Batch(prompt, prompt)),
        (alone, Batch(decodes)),
    ]
    return [compilers.predict(call, [batch], chip) for call, batch in pairs]
