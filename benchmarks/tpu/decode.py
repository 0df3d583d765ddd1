"""Decoding: bundles of instructions per token, and the share of the bandwidth that is used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

from ...kernels import DecodeBlocks
from ...kernels.tuning import Assumptions, Batch, Call, Compilers, Prediction, ReplayError
from ...kernels.tuning.candidates import workloads
from .rows import Row

BLOCK = 1024  # tokens of a unit, where bundles are counted
HEADS = ((32, 8), (8, 2), (8, 1))
SEQUENCES = 64
SHARES = {128: 0.5, 512: 0.85, 2048: 0.95, 8192: 0.95}  # context: the least share of the bandwidth
QUANTIZED = {"int8": 1.7, "float8_e4m3fn": None}  # at least so many times the tokens per second of bfloat16
LATENCIES = (0.5, 1.0, 2.0)  # us
HEADLINE = LATENCIES.index(1.0)
LONG, SHORT = Batch((8192,) * SEQUENCES), Batch((4096,) * SEQUENCES)


def decode_rows(chip: str, compilers: Compilers) -> Iterator[Row]:
    """All rows about decoding on a chip; the compiling is begun at once."""
    assumed = [Assumptions.of(chip, latency_us=latency) for latency in LATENCIES]
    counted = {
        (heads, page_size): compilers.predict(_blocked(heads, page_size), [LONG, SHORT], chip)
        for heads in (HEADS[0], HEADS[-1])
        for page_size in (64, 16)
    }
    twice = compilers.predict(_blocked(HEADS[0], 64, lanes=2), [LONG, SHORT], chip)
    theirs = compilers.predict(_theirs(HEADS[0], BLOCK), [LONG, SHORT], chip)
    shares = {
        (heads, kv_dtype): _start_shares(heads, kv_dtype, chip, compilers, assumed)
        for heads in HEADS
        for kv_dtype in ("bfloat16", *QUANTIZED)
    }
    their_shares = compilers.predict(_theirs(HEADS[0], 512), _batches(), chip, assumed)
    yield from _bundle_rows(chip, counted, twice, theirs)
    yield from _share_rows(chip, shares, their_shares)


def _blocked(heads: tuple[int, int], page_size: int, lanes: int = 1) -> Call:
    blocks = DecodeBlocks(BLOCK, lanes=lanes, depth=8 // lanes)
    return Call(kernel="decode", num_q_heads=heads[0], num_kv_heads=heads[1], page_size=page_size,
        block_sizes=blocks)  # fmt: skip


def _theirs(heads: tuple[int, int], tokens: int) -> Call:
    """jax's kernel with 8 queries per block, which its users take for decoding."""
    return Call(kernel="jax_ragged", num_q_heads=heads[0], num_kv_heads=heads[1], max_tokens=SEQUENCES,
        block_sizes=(tokens // 64, 8))  # fmt: skip


def per_token_and_sequence(long: int, short: int) -> tuple[float, float]:
    """Bundles per token of the cache, and per sequence besides, from the bundles of LONG and of SHORT."""
    tokens = SEQUENCES * (LONG.kv_lens[0] - SHORT.kv_lens[0])
    per_token = (long - short) / tokens
    return per_token, short / SEQUENCES - per_token * SHORT.kv_lens[0]


def _of(predictions: list[Prediction]) -> tuple[float, float]:
    return per_token_and_sequence(*(prediction.bundles for prediction in predictions))


def unless_it_stops(theirs: Future[list[Prediction]]) -> list[Prediction] | None:
    """Predictions of jax's kernel; None, and a line that says so, if the replay cannot follow its program."""
    try:
        return theirs.result()
    except ReplayError as error:
        print(f"jax's kernel is not shown: its program cannot be replayed: {error}", file=sys.stderr)
        return None


def _spills_per_block(predictions: list[Prediction]) -> float:
    """Registers spilled and filled again per BLOCK tokens of the cache, as executed for LONG beyond SHORT."""
    long, short = (prediction.runs[0].work.spills for prediction in predictions)
    return (long - short) / (SEQUENCES * (LONG.kv_lens[0] - SHORT.kv_lens[0]) // BLOCK)


def _bundle_rows(
    chip: str,
    counted: dict[tuple[tuple[int, int], int], Future[list[Prediction]]],
    twice: Future[list[Prediction]],
    theirs: Future[list[Prediction]],
) -> Iterator[Row]:
    is_v6e = chip == "v6e"  # the chip whose bundles the targets are for
    found = {key: _of(future.result()) for key, future in counted.items()}
    per_token, per_sequence = found[HEADS[0], 64]
    their_predictions = unless_it_stops(theirs)
    their_token, their_sequence = None, None
    if their_predictions is not None:
        their_token, their_sequence = _of(their_predictions)
    name = f"decode {HEADS[0]}, block {BLOCK}, page 64: bundles per"
    yield Row(chip, f"{name} token", "", per_token, their_token, at_most=1.1 if is_v6e else None)
    yield Row(chip, f"{name} sequence", "", per_sequence, their_sequence, at_most=200.0 if is_v6e else None)
    per_token, per_sequence = _of(twice.result())
    name = "the same, two blocks side by side: bundles per"
    yield Row(chip, f"{name} token", "", per_token, at_most=1.1 if is_v6e else None)
    yield Row(chip, f"{name} sequence", "", per_sequence, at_most=200.0 if is_v6e else None)
    spills = _spills_per_block(counted[HEADS[0], 64].result())
    yield Row(chip, f"decode {HEADS[0]}, block {BLOCK}, page 64: spills and fills per block", "", spills,
        at_most=0.0 if is_v6e else None)  # fmt: skip
    for heads, most in ((HEADS[0], 1.4), (HEADS[-1], 1.8)):
        ratio = found[heads, 16][0] / found[heads, 64][0]
        yield Row(chip, f"decode {heads}: bundles per token at page 16 over page 64", "x", ratio,
            at_most=most if is_v6e else None)  # fmt: skip


def _batches() -> list[Batch]:
    """Equal lengths of each context, and lengths drawn log-uniform from 128 to 8,192."""
    return [*(workloads("decode", context)[0] for context in SHARES), workloads("decode", 8192)[1]]


def _start_shares(
    heads: tuple[int, int], kv_dtype: str, chip: str, compilers: Compilers, assumed: list[Assumptions]
) -> list[Future[list[Prediction]]]:
    """Each batch with a page table as wide as it needs, and the block sizes that the kernel chooses."""
    call = Call(kernel="decode", num_q_heads=heads[0], num_kv_heads=heads[1], kv_dtype=kv_dtype)
    return [
        compilers.predict(replace(call, max_context=context), [batch], chip, assumed)
        for context, batch in zip((*SHARES, 8192), _batches(), strict=True)
    ]


def _share_rows(
    chip: str,
    shares: dict[tuple[tuple[int, int], str], list[Future[list[Prediction]]]],
    theirs: Future[list[Prediction]],
) -> Iterator[Row]:
    names = [*(f"{context:,} tokens" for context in SHARES), "128 to 8,192 tokens"]
    least = [*SHARES.values(), 0.92]
    their_all = unless_it_stops(theirs)
    for heads in HEADS:
        found = [future.result() for future in shares[heads, "bfloat16"]]
        for at, name in enumerate(names):
            their = None
            if heads == HEADS[0] and their_all is not None:
                their = their_all[at * len(LATENCIES) + HEADLINE].mbu
            by_latency = {str(us): p.mbu for us, p in zip(LATENCIES, found[at], strict=True)}
            yield Row(chip, f"decode {heads}, {name}: MBU at 1 us ({by_latency['0.5']:.1%} at 0.5, "
                f"{by_latency['2.0']:.1%} at 2)", "%", found[at][HEADLINE].mbu, their, at_least=least[at],
                raw={"mbu": by_latency, "bound": found[at][HEADLINE].bound,
                     "time_us": found[at][HEADLINE].time_us})  # fmt: skip
        for kv_dtype, aim in QUANTIZED.items():
            for at, name in list(enumerate(names))[2:4]:
                before, after = (p[HEADLINE] for p in (found[at], shares[heads, kv_dtype][at].result()))
                yield Row(chip, f"decode {heads}, {name}: tokens per second, {kv_dtype} over bfloat16", "x",
                    before.time_us / after.time_us, at_least=aim,
                    raw={"bound": after.bound, "time_us": after.time_us})  # fmt: skip
