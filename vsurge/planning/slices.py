"""Slices of TPUs: their names, their shapes, and what of them is published.

A device is what jax calls one: a chip, but a TensorCore of v4 and of 7x, two of which share a chip.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..kernels.tuning.chips import Chip, find_chip


@dataclass(frozen=True)
class SliceKind:
    """What the slices of a chip have in common.

    The interconnect's figures are those of the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" of
    the Cloud TPU documentation (docs.cloud.google.com/tpu/docs), which give both directions of all ports
    together. For v4 the page of v5p gave 2,400 Gbit/s in one direction beside its own 4,800, which has become
    1,200 GB/s in both since.

    Attributes:
        prefix: of the names that the compiler knows topologies by.
        shapes: of slices that are offered, chips along each dimension, the smallest first.
        devices_per_chip: as jax counts them.
        cores_per_device: TensorCores that one program runs on.
        hbm_gib: of a device, that the compiler lets a program use: what libtpu 0.0.42.1 says where one asks
            for more, in 2^30 bytes.
        ici_gbytes_per_s: of a chip's interconnect, both directions of all ports, in 10^9 bytes.
        ici_ports: of a chip.
        wraps: chips along a dimension from whose multiples on its ends are connected.
    """

    prefix: str
    shapes: tuple[tuple[int, ...], ...]
    devices_per_chip: int
    cores_per_device: int
    hbm_gib: float
    ici_gbytes_per_s: float
    ici_ports: int
    wraps: int

    @property
    def link_gbytes_per_s(self) -> float:
        """Of one link, in one direction."""
        return self.ici_gbytes_per_s / self.ici_ports / 2

    @property
    def hbm_bytes(self) -> int:
        return int(self.hbm_gib * 2**30)


FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))

SLICE_KINDS = {
    "v4": SliceKind("v4", CUBES, 2, 1, 15.25, 600.0, 6, 4),
    "v5e": SliceKind("v5e", FLAT, 1, 1, 15.75, 400.0, 4, 16),
    "v5p": SliceKind("v5p", CUBES, 1, 2, 95.74, 1200.0, 6, 4),
    "v6e": SliceKind("v6e", FLAT, 1, 1, 31.25, 800.0, 4, 16),
    "7x": SliceKind("tpu7x", CUBES, 2, 1, 94.75, 1200.0, 6, 4),
}


@dataclass(frozen=True)
class Slice:
    """Connected chips.

    Attributes:
        chip: one of `SLICE_KINDS`.
        shape: chips along each dimension.
    """

    chip: str
    shape: tuple[int, ...]

    @property
    def kind(self) -> SliceKind:
        return SLICE_KINDS[self.chip]

    @property
    def core(self) -> Chip:
        return find_chip(self.chip)

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.kind.devices_per_chip

    @property
    def name(self) -> str:
        """As the compiler knows it, "v6e:2x4"."""
        return f"{self.kind.prefix}:{'x'.join(map(str, self.shape))}"

    def part(self, num_devices: int) -> tuple[int, ...]:
        """The shape of the chips of the first so many devices, which fill the first dimensions first.

        Where that is no box it is the smallest that holds them.
        """
        left = -(-num_devices // self.kind.devices_per_chip)
        shape = list[int]()
        for size in self.shape:
            shape.append(min(size, left))
            left = -(-left // size)
        return tuple(shape)


def parse_slice(text: str) -> Slice:
    """A slice from "v6e:2x4", or "tpu7x:2x2x1" (or "7x:2x2x1").

    Raises:
        ValueError: no such chip, or no slice that is offered.
    """
    match = re.fullmatch(r"(?:tpu)?(\w+):(\d+(?:x\d+)*)", text.strip())
    if match is None:
        raise ValueError(f"slice {text!r}: must be a chip and a shape, like v6e:2x4 or tpu7x:2x2x1")
    chip, shape = match[1], tuple(int(size) for size in match[2].split("x"))
    if chip not in SLICE_KINDS:
        raise ValueError(f"slice {text!r}: the chip must be one of {', '.join(SLICE_KINDS)}")
    if shape not in SLICE_KINDS[chip].shapes:
        names = ", ".join(Slice(chip, shape).name for shape in SLICE_KINDS[chip].shapes)
        raise ValueError(f"slice {text!r}: must be one of {names}")
    return Slice(chip, shape)


def slices_of(chip: str) -> list[Slice]:
    """The slices of a chip that are offered, the smallest first."""
    return [Slice(chip, shape) for shape in SLICE_KINDS[chip].shapes]
