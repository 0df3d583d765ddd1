"""The search for block sizes: every candidate is compiled once and its times on all contexts are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import pairwise
from math import exp, fsum, log
from typing import Any

from ..block_sizes import Entry
from .calls import Batch, Call
from .candidates import Blocks, candidates, workloads
from .chips import find_chip
from .predict import Compilers
from .prediction import Assumptions, Prediction

REFUSALS = (ValueError, RuntimeError)  # of the kernel; of the compiler and of the replay
Timer = Callable[[Call, Batch], float]  # microseconds


# Of `Assumptions`; a table tells where they are not the chip's.
RATES = ("gbytes_per_s", "tflops", "clock_ghz")


@dataclass(frozen=True)
class Trial:
    """What became of a candidate.

    Attributes:
        blocks: the candidate.
        predicted: per context, a prediction for each of its `workloads`; empty if it was refused.
        measured_us: per context, the time of each workload; None without a TPU.
        refused: why the kernel, the compiler or the replay refused it, in one line; else None.
    """

    blocks: Blocks
    predicted: tuple[tuple[Prediction, ...], ...] = ()
    measured_us: tuple[tuple[float, ...], ...] | None = None
    refused: str | None = None

    def predicted_us(self, at: int) -> float:
        """The geometric mean of the predicted times on context number `at`."""
        return _mean([prediction.time_us for prediction in self.predicted[at]])

    def time_us(self, at: int) -> float:
        """As `predicted_us`, of the measured times if there are any."""
        return self.predicted_us(at) if self.measured_us is None else _mean(self.measured_us[at])

    def equal_lengths_us(self, at: int) -> float:
        """The time of the first workload on context number `at`: measured if there is a TPU."""
        return self.predicted[at][0].time_us if self.measured_us is None else self.measured_us[at][0]

    def shares(self, at: int) -> tuple[float, float]:
        """MBU and MFU, as of `Prediction`, over `equal_lengths_us`."""
        prediction = self.predicted[at][0]
        times = prediction.time_us / self.equal_lengths_us(at)
        return prediction.mbu * times, prediction.mfu * times


@dataclass(frozen=True)
class Search:
    """A search under way for one call on one chip.

    Attributes:
        call: with the longest context, and room for the workloads; its block sizes do not matter.
        chip, contexts: contexts in tokens, ascending.
        pending: the candidates, and what will be predicted of each.
    """

    call: Call
    chip: str
    contexts: tuple[int, ...]
    pending: tuple[tuple[Blocks, Future[list[Prediction]]], ...]

    def finish(self, at: int, timer: Timer | None = None) -> Trial:
        """What became of candidate number `at`; waits for it.

        Args:
            timer: times a call on the TPU that is here; None to predict only.
        """
        blocks, future = self.pending[at]
        try:
            found = iter(future.result())
            predicted = tuple(tuple(next(found) for _ in batches) for batches in self._workloads())
            if timer is None:
                return Trial(blocks, predicted)
            calls = (replace(self.call, block_sizes=blocks, max_context=c) for c in self.contexts)
            measured = tuple(
                tuple(timer(call, batch) for batch in batches)
                for call, batches in zip(calls, self._workloads(), strict=True)
            )
        except REFUSALS as error:
            return Trial(blocks, refused=" ".join(str(error).split())[:300] or type(error).__name__)
        return Trial(blocks, predicted, measured)

    def winners(self, trials: Sequence[Trial]) -> list[Entry]:
        """The fastest trial of each context, with its margin over the runner-up.

        Raises:
            ValueError: all candidates were refused.
        """
        possible = [trial for trial in trials if trial.refused is None]
        if not possible:
            raise ValueError(f"{self.call.key}: every candidate was refused, the first: {trials[0].refused}")
        return [
            Entry(self.call.key, more_than, up_to, *self._winner(possible, at))
            for at, (more_than, up_to) in enumerate(pairwise((0, *self.contexts)))
        ]

    def _winner(self, possible: list[Trial], at: int) -> tuple[dict[str, int], dict[str, Any]]:
        """The blocks of the fastest trial on context number `at`, and their provenance."""
        ranked = sorted(possible, key=lambda trial: trial.time_us(at))
        best, second = ranked[0], ranked[min(1, len(ranked) - 1)]
        assumed, usual = best.predicted[at][0].assumptions, Assumptions.of(self.chip)
        provenance: dict[str, Any] = {
            "by": "predicted" if best.measured_us is None else "measured",
            "predicted_us": round(best.predicted_us(at), 2),
            "measured_us": None if best.measured_us is None else round(best.time_us(at), 2),
            "margin": round(second.time_us(at) / best.time_us(at) - 1, 4),
            "runner_up": asdict(second.blocks),
            "tried": len(ranked),
            "latency_us": assumed.latency_us,
            "copy_ns": assumed.copy_ns,
            **{
                name: getattr(assumed, name)
                for name in RATES
                if getattr(assumed, name) != getattr(usual, name)
            },
            "jax": metadata.version("jax"),
            "libtpu": metadata.version("libtpu"),
        }
        return asdict(best.blocks), provenance

    def _workloads(self) -> list[tuple[Batch, ...]]:
        return [workloads(self.call.kernel, context) for context in self.contexts]


def start_search(
    call: Call,
    contexts: Sequence[int],
    chip: str,
    compilers: Compilers,
    *,
    few: bool = False,
    assumptions: Assumptions | None = None,
) -> Search:
    """Begins to compile all candidates for a call.

    Args:
        call: "decode" or "ragged"; its `max_context` and block sizes do not matter.
        contexts: where the ranges end that get block sizes of their own, in tokens.
        chip: one of `CHIPS`.
        compilers: that do the work.
        few: as of `candidates`.
        assumptions: None for `Assumptions.of(chip)`.

    Raises:
        ValueError: an unknown chip, or no contexts.
    """
    find_chip(chip)
    if not contexts or min(contexts) < 1:
        raise ValueError(
            f"contexts={tuple(contexts)}: must be at least one number of tokens, each at least 1"
        )
    ascending = tuple(sorted(set(contexts)))
    call = replace(call, max_context=ascending[-1], block_sizes=None)
    batches = [batch for context in ascending for batch in workloads(call.kernel, context)]
    assumed = [assumptions or Assumptions.of(chip)]
    pending = tuple(
        (blocks, compilers.predict(replace(call, block_sizes=blocks), batches, chip, assumed))
        for blocks in candidates(call, chip, few=few)
    )
    return Search(call, chip, ascending, pending)


def _mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return exp(fsum(map(log, values)) / len(values))
