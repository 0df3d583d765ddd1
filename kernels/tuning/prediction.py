"""What is predicted of a kernel call, and what a prediction takes for granted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .calls import Batch, Call
from .chips import find_chip
from .loops import LoopRun, Work
from .replay import Memory, Replay
from .spills import Spill
from .vmem import VectorMemory

Bound = Literal["compute", "bandwidth", "latency"]


@dataclass(frozen=True)
class Assumptions:
    """What a prediction takes for granted of a chip's core.

    Attributes:
        gbytes_per_s: bandwidth of HBM, in 10^9 bytes.
        tflops: rate of bfloat16 products, in 10^12, of which MFU is a share.
        clock_ghz: bundles issued per nanosecond.
        latency_us: from the end of a copy's service by the memory to its arrival.
        copy_ns: that the memory is busy with a copy besides its bytes.
    """

    gbytes_per_s: float
    tflops: float
    clock_ghz: float
    latency_us: float = 1.0
    copy_ns: float = 0.0

    @classmethod
    def of(cls, chip: str, *, latency_us: float = 1.0, copy_ns: float = 0.0) -> Assumptions:
        """Those of `CHIPS`."""
        known = find_chip(chip)
        return cls(known.gbytes_per_s, known.tflops, known.clock_ghz, latency_us, copy_ns)

    def memory(self) -> Memory:
        """As a replay counts, in cycles."""
        ns = self.clock_ghz
        return Memory(self.gbytes_per_s / self.clock_ghz, self.latency_us * 1000 * ns, self.copy_ns * ns)


@dataclass(frozen=True)
class KernelRun:
    """One kernel's part in a call.

    Attributes:
        kernel: its name.
        replay: what happened.
        bundles: issued bundles that were not empty.
        work: all that was issued, and how full it was.
        busiest: the same of the straight piece of program that took most.
        loops: those that were gone through, the one that took most first.
        spills: how often each kind of vector register was spilled.
        vector_memory: what the compiler allots to it; None if it does not say.
    """

    kernel: str
    replay: Replay
    bundles: int
    work: Work
    busiest: Work
    loops: tuple[LoopRun, ...]
    spills: Mapping[Spill, int]
    vector_memory: VectorMemory | None


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a call's kernels, one after another; XLA's own operations around them aside.

    Attributes:
        call, batch, chip, assumptions: what was predicted.
        runs: the call's kernels.
        time_us: of all of them; never less than `matrix_us`.
        compute_us: of it, with a bundle issued, or `matrix_us` if that is longer.
        matrix_us: what the matrix units need at their peak for the unmasked pairs alone. (The compiler's
            schedule of bare products can have fewer bundles than that: see `bare.product_cycles`.)
        memory_us: of it, with the memory serving copies.
        mbu: bytes of keys and values that the batch's queries see, over the time and the bandwidth.
        mfu: operations of unmasked pairs, over the time and the matrix rate.
    """

    call: Call
    batch: Batch
    chip: str
    assumptions: Assumptions
    runs: tuple[KernelRun, ...]

    @property
    def time_us(self) -> float:
        return max(self._us(sum((run.replay.cycles for run in self.runs), 0.0)), self.matrix_us)

    @property
    def compute_us(self) -> float:
        return max(self._us(float(sum(run.replay.issued for run in self.runs))), self.matrix_us)

    @property
    def matrix_us(self) -> float:
        return self.call.useful_flops(self.batch) / (self.assumptions.tflops * 1e6)

    @property
    def memory_us(self) -> float:
        return self._us(sum((run.replay.busy for run in self.runs), 0.0))

    @property
    def bundles(self) -> int:
        """Issued bundles that were not empty, as the compiler's final schedule counts them."""
        return sum(run.bundles for run in self.runs)

    @property
    def bound(self) -> Bound:
        """The largest of: issuing bundles, serving copies, and the time that neither explains."""
        shares: dict[Bound, float] = {"compute": self.compute_us, "bandwidth": self.memory_us}
        shares["latency"] = self.time_us - max(shares.values())
        return max(shares, key=lambda bound: shares[bound])

    @property
    def mbu(self) -> float:
        return self.call.useful_bytes(self.batch) / (self.time_us * self.assumptions.gbytes_per_s * 1e3)

    @property
    def mfu(self) -> float:
        return self.matrix_us / self.time_us

    def _us(self, cycles: float) -> float:
        return cycles / (self.assumptions.clock_ghz * 1000)
