"""What a plan takes for granted, and where each number is from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ..kernels.tuning.prediction import Assumptions
from .slices import Slice


@dataclass(frozen=True)
class PlanAssumptions:
    """The numbers that a plan's times rest on.

    Attributes:
        gbytes_per_s: bandwidth of a core's memory, in 10^9 bytes.
        tflops: a core's rate of bfloat16 products, in 10^12.
        clock_ghz: bundles that a core issues per nanosecond.
        latency_us: from the end of a copy's service by the memory to its arrival, in the attention kernels.
        copy_ns: that the memory is busy with such a copy besides its bytes.
        link_gbytes_per_s: of a link between chips in one direction, in 10^9 bytes.
        hop_us: until what a chip sends begins to arrive at its neighbour.
        logit_passes: how often a step reads or writes an array of float32 the size of its logits.
        step_us: between two steps.
    """

    gbytes_per_s: float
    tflops: float
    clock_ghz: float
    link_gbytes_per_s: float
    latency_us: float = 1.0
    copy_ns: float = 0.0
    hop_us: float = 1.0
    logit_passes: float = 10.0
    step_us: float = 0.0

    @classmethod
    def of(cls, slice_: Slice) -> PlanAssumptions:
        """Those of a slice's chips."""
        core = slice_.core
        return cls(core.gbytes_per_s, core.tflops, core.clock_ghz, slice_.kind.link_gbytes_per_s)

    def of_kernels(self) -> Assumptions:
        """Those of the attention kernels' predictions."""
        return Assumptions(self.gbytes_per_s, self.tflops, self.clock_ghz, self.latency_us, self.copy_ns)


_CORE = "jax.experimental.pallas.tpu.get_tpu_info (jax 0.10.2)"
SOURCES = {
    "gbytes_per_s": ("GB/s of memory, a core", _CORE),
    "tflops": ("TFLOP/s of bfloat16, a core", _CORE),
    "clock_ghz": ("GHz", "derived from the matrix rate; not published for all"),
    "link_gbytes_per_s": (
        "GB/s of a link, one direction",
        "Cloud TPU documentation: the chip's bidirectional bandwidth over its ports, halved",
    ),
    "latency_us": ("us from a copy's service to its arrival", "assumed; nobody has published it"),
    "copy_ns": ("ns that a copy takes besides its bytes", "assumed; nobody has published it"),
    "hop_us": ("us from a chip to its neighbour", 'about 1 us: "How to Scale Your Model", chapter 3'),
    "logit_passes": (
        "arrays of logits read or written to choose tokens",
        "assumed: logits, bias and counts, each a few times",
    ),
    "step_us": ("us between two steps", "the next step is dispatched before a step ends"),
}
NAMES = tuple(SOURCES)
MAY_BE_ZERO = ("latency_us", "copy_ns", "hop_us", "logit_passes", "step_us")
# What has no number of its own.
ALWAYS = (
    "memory of a device: what libtpu's compiler lets a program use",
    "steps of two layers and of three are compiled, of 64 sequences at most; the other layers take what the "
    "third one adds, and larger batches send and take in proportion",
    "the parts of a step follow one another: no collective hides behind a product",
    "a product takes the longer of its operations at the matrix rate and its weights at the bandwidth; what "
    "goes from one product to the next stays in vector memory",
    "attention: the kernel's schedule, compiled for the device's heads and replayed over the lengths "
    "(kernels.tuning); equal lengths",
    "a collective goes round a ring in each dimension of the chips that share the model",
    "expert weights: each token takes experts at random, evenly over the devices",
)


def parse_plan_assumptions(texts: Sequence[str]) -> dict[str, float]:
    """Names and numbers from "hop_us=2" and the like.

    Raises:
        ValueError: no such assumption, or no number that it can be.
    """
    found = dict[str, float]()
    for text in texts:
        name, _, value = text.partition("=")
        if name not in NAMES:
            raise ValueError(f"--assume {text}: must be NAME=NUMBER with one of {', '.join(NAMES)}")
        least = 0.0 if name in MAY_BE_ZERO else math.ulp(0.0)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not least <= number < math.inf:
            raise ValueError(f"--assume {text}: must be a number, {'at least' if not least else 'above'} 0")
        found[name] = number
    return found


def assumed(slice_: Slice, given: dict[str, float]) -> PlanAssumptions:
    """The assumptions of a slice, with others in the place of some."""
    return replace(PlanAssumptions.of(slice_), **given)


def explain(assumptions: PlanAssumptions, given: dict[str, float]) -> list[tuple[str, float, str, str]]:
    """Name, number, meaning and source of each."""
    return [
        (name, value, SOURCES[name][0], "--assume" if name in given else SOURCES[name][1])
        for name, value in asdict(assumptions).items()
    ]
