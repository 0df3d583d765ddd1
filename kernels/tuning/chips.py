"""The chips that kernels are compiled for, and the rates that a prediction assumes of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One TensorCore of a chip, its share of the memory included.

    Bandwidth and matrix rate are those of `jax.experimental.pallas.tpu.get_tpu_info` (jax 0.10.2). The clock
    is not published for all: it is derived from the matrix rate and the size of the matrix units.

    Attributes:
        topology: the smallest one that the compiler knows.
        cores: TensorCores of a chip; all figures are for one.
        gbytes_per_s: of HBM, in 10^9 bytes.
        tflops: of bfloat16 products, in 10^12.
        clock_ghz: bundles issued per nanosecond.
        vmem_mib: vector memory, in 2^20 bytes.
    """

    topology: str
    cores: int
    gbytes_per_s: float
    tflops: float
    clock_ghz: float
    vmem_mib: int


CHIPS = {
    "v4": Chip("v4:2x2x1", 2, 615.0, 137.5, 1.05, 16),
    "v5e": Chip("v5e:2x2", 1, 820.0, 197.0, 1.5, 128),
    "v5p": Chip("v5p:2x2x1", 2, 1230.0, 229.5, 1.75, 64),
    "v6e": Chip("v6e:2x2", 1, 1640.0, 920.0, 1.75, 128),
    "7x": Chip("tpu7x:2x2x1", 2, 3700.0, 1155.0, 2.2, 64),
}


def find_chip(name: str) -> Chip:
    """The chip of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in CHIPS:
        raise ValueError(f"chip={name!r}: must be one of {tuple(CHIPS)}")
    return CHIPS[name]
