"""The search for what is fastest on the GPU that is here: every candidate is timed, XLA's program, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import pairwise, product
from math import exp, fsum, log
from typing import Any

from ..block_sizes import Entry
from ..decode import TritonDecodeBlocks
from ..ragged import TritonRaggedBlocks
from .calls import Batch, Call
from .candidates import workloads

REFUSALS = (ValueError, RuntimeError, NotImplementedError)  # of the kernel, of Triton, of the memory
Timer = Callable[[Call, Batch], float]  # microseconds
WARPS_AND_STAGES = ((4, 2), (4, 3), (8, 2), (8, 3))


@dataclass(frozen=True)
class TimedTrial:
    """What became of a candidate.

    Attributes:
        call: the candidate, with its implementation and block sizes.
        measured_us: per context, the time of each of its `workloads`; empty where it was refused.
        refused: per context, why it could not be timed, in one line; else None.
    """

    call: Call
    measured_us: tuple[tuple[float, ...], ...]
    refused: tuple[str | None, ...]

    @property
    def blocks(self) -> dict[str, int]:
        """Fields of the block sizes; none of "xla"."""
        sizes = self.call.block_sizes
        return asdict(sizes) if isinstance(sizes, TritonDecodeBlocks | TritonRaggedBlocks) else {}

    @property
    def name(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.blocks.items())
        return f"{self.call.implementation} {sizes}".rstrip()

    def time_us(self, at: int) -> float:
        """The geometric mean of the workloads' times on context number `at`, which was not refused."""
        times = self.measured_us[at]
        return exp(fsum(map(log, times)) / len(times))


def timed_candidates(call: Call, *, few: bool = False) -> list[Call]:
    """XLA's program, the Triton kernel with its default block sizes, and with others.

    Args:
        call: "decode" or "ragged".
        few: a handful.
    """
    sizes: list[TritonDecodeBlocks | TritonRaggedBlocks]
    if call.kernel == "decode":
        default = TritonDecodeBlocks()
        sizes = [
            TritonDecodeBlocks(kv_tokens, int(default.programs * share), *launch)
            for kv_tokens, share, launch in product((32, 64, 128), (0.5, 1, 2), WARPS_AND_STAGES)
        ]
        some = [replace(default, programs=2 * default.programs), replace(default, kv_tokens=128)]
        sizes = [default, *(some if few else sizes)]
    else:
        ragged = TritonRaggedBlocks()
        sizes = [
            TritonRaggedBlocks(rows, kv_tokens, *launch)
            for rows, kv_tokens, launch in product((64, 128), (32, 64, 128), WARPS_AND_STAGES)
        ]
        sizes = [ragged, *([replace(ragged, rows=64), replace(ragged, kv_tokens=128)] if few else sizes)]
    kernels = [replace(call, implementation="triton", block_sizes=each) for each in dict.fromkeys(sizes)]
    return [replace(call, implementation="xla", block_sizes=None), *kernels]


def time_candidate(call: Call, contexts: Sequence[int], timer: Timer) -> TimedTrial:
    """Times a candidate on the workloads of all contexts, with room for each context and no more.

    A context that is refused, for want of memory perhaps, leaves the others.

    Args:
        call: one of `timed_candidates`.
        contexts: in tokens, ascending.
        timer: `time_call`, or what takes its place.
    """
    measured, refused = list[tuple[float, ...]](), list[str | None]()
    for context in contexts:
        of_context = replace(call, max_context=context)
        try:
            measured.append(tuple(timer(of_context, batch) for batch in workloads(call.kernel, context)))
            refused.append(None)
        except REFUSALS as error:
            measured.append(())
            refused.append(" ".join(str(error).split())[:300] or type(error).__name__)
    return TimedTrial(call, tuple(measured), tuple(refused))


def fastest(
    call: Call, contexts: Sequence[int], trials: Sequence[TimedTrial], rates: dict[str, float]
) -> list[tuple[TimedTrial, Entry]]:
    """The fastest trial of each context, and its entry for the table; none where all were refused.

    Args:
        call: whose candidates were timed.
        contexts: as of `time_candidate`.
        trials: of all candidates.
        rates: of the device, for the provenance.

    Raises:
        ValueError: all candidates were refused on all contexts.
    """
    found = list[tuple[TimedTrial, Entry]]()
    for at, (more_than, up_to) in enumerate(pairwise((0, *contexts))):
        possible = [trial for trial in trials if trial.refused[at] is None]
        if not possible:
            continue
        ranked = sorted(possible, key=lambda trial, at=at: trial.time_us(at))
        best, second = ranked[0], ranked[min(1, len(ranked) - 1)]
        provenance: dict[str, Any] = {
            "by": "measured",
            "measured_us": round(best.time_us(at), 2),
            "margin": round(second.time_us(at) / best.time_us(at) - 1, 4),
            "runner_up": second.name,
            "tried": len(possible),
            **rates,
            "jax": metadata.version("jax"),
        }
        implementation = best.call.implementation
        found.append((best, Entry(call.key, more_than, up_to, best.blocks, provenance, implementation)))
    if not found:
        raise ValueError(f"{call.key}: every candidate was refused, the first: {trials[0].refused[0]}")
    return found
