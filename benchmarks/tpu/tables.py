"""Makes the committed tables of block sizes anew: `python -m vsurge.benchmarks.tpu.tables`.

For the heads of every Qwen3 and their shards over 2, 4 and 8 devices. The page size decides little
but for the number of copies, so what is found at one page size is entered for similar ones too; `provenance`
says so. Prints every entry whose block sizes change.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import jax

from ...kernels.block_sizes import Entry, read_table, table_path, write_table
from ...kernels.block_sizes.table import merged
from ...kernels.tuning import CHIPS, Call, Compilers
from ...kernels.tuning.search import Search, start_search
from ...model.progress import progress_bar

# Query and KV heads: Qwen3-0.6B and 1.7B, 4B and 8B, 14B, 32B, 30B-A3B, 235B-A22B.
MODELS = ((16, 8), (32, 8), (40, 8), (64, 8), (32, 4), (64, 4))
SHARDS = (1, 2, 4, 8)
# Kernel -> page size that is searched -> page sizes that get what is found.
PAGES = {"decode": {64: (128, 64), 16: (16,)}, "ragged": {64: (128, 64, 16)}}
CONTEXTS = (128, 512, 2048, 8192)  # longer ones take what the last of these gets
CONTEXTS_OF_PROMPTS = (512, 2048, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", action="append", choices=list(CHIPS), help="default: v5e, v5p, v6e and 7x")
    parser.add_argument("--heads", action="append", metavar="Q,KV", help="like 32,8 (default: all)")
    parser.add_argument("--kv-dtype", action="append", help="default: bfloat16")
    parser.add_argument("--kernel", action="append", choices=("decode", "ragged"), help="default: both")
    parser.add_argument("--page-size", action="append", type=int, choices=(64, 16), help="(default: all)")
    parser.add_argument("--out", type=Path, help="folder (default: kernels/block_sizes)")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # a TPU is not looked for
    heads = [tuple(map(int, pair.split(","))) for pair in arguments.heads or ()] or all_heads()
    for chip in arguments.chip or ("v5e", "v5p", "v6e", "7x"):
        path = arguments.out / f"{chip}.json" if arguments.out else table_path(chip)
        calls = list(all_calls(heads, arguments.kv_dtype or ("bfloat16",), arguments.kernel))
        calls = [call for call in calls if call.page_size in (arguments.page_size or (call.page_size,))]
        with Compilers() as compilers:
            searches = [_start(call, chip, compilers) for call in calls]
            for search in progress_bar(searches, chip, show=True):
                old, found = read_table(path), _finish(search)
                for line in changes(old, found):
                    print(f"{chip}: {line}")
                write_table(path, merged(old, found))  # at once, so that nothing is lost if a later one fails
                print(f"{chip}: {search.call.key}: {len(found)} entries written to {path}", flush=True)


def all_heads() -> list[tuple[int, ...]]:
    """Heads of one chip, (query, KV), each once."""
    shards = ((q // n, max(kv // n, 1)) for (q, kv), n in product(MODELS, SHARDS))
    return sorted(set(shards), reverse=True)


def all_calls(
    heads: Sequence[tuple[int, ...]], kv_dtypes: Sequence[str], kernels: Sequence[str] | None
) -> Iterable[Call]:
    """The calls that get block sizes."""
    for (q, kv), dtype in product(heads, kv_dtypes):
        call = Call(kernel="decode", num_q_heads=q, num_kv_heads=kv, kv_dtype=dtype)
        for kernel in kernels or PAGES:
            yield from (replace(call, kernel=kernel, page_size=page_size) for page_size in PAGES[kernel])


def changes(old: Iterable[Entry], new: Iterable[Entry]) -> list[str]:
    """What changes of the block sizes, an entry a line."""
    before = {entry.replaces: entry for entry in old}
    lines = list[str]()
    for entry in new:
        known = before.get(entry.replaces)
        if known is None or known.blocks != entry.blocks:
            was = "new" if known is None else f"{_blocks(known)} before"
            margin = entry.provenance["margin"]
            lines.append(f"{entry.key}, up to {entry.up_to}: {_blocks(entry)} ({was}; ahead by {margin:.2%})")
    return lines


def _blocks(entry: Entry) -> str:
    return " ".join(f"{name}={value}" for name, value in entry.blocks.items())


def _start(call: Call, chip: str, compilers: Compilers) -> Search:
    contexts = CONTEXTS if call.kernel == "decode" else CONTEXTS_OF_PROMPTS
    return start_search(call, contexts, chip, compilers, few=True)


def _finish(search: Search) -> list[Entry]:
    """The winners, for every page size that gets them."""
    entries = search.winners([search.finish(at) for at in range(len(search.pending))])
    searched = search.call.page_size
    return [
        replace(
            entry,
            key=replace(entry.key, page_size=page_size),
            provenance={**entry.provenance, "page_size": searched},
        )
        for entry, page_size in product(entries, PAGES[search.call.kernel][searched])
    ]


if __name__ == "__main__":
    main()
