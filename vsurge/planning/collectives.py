"""What the devices of a compiled program send each other, and how long that takes."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace

import jax

from .slices import Slice

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_OPERATION = re.compile(rf"= (?P<shapes>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_SHAPE = re.compile(r"(?P<dtype>pred|[a-z]+\d+)(?:e\w+)?\[(?P<sizes>[\d,]*)\]")
_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")  # not: body, condition, branch_computations
# groups of devices: numbered, by axes of a mesh (whose devices may be told, too), or listed
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_AXES = re.compile(r"replica_groups=mesh\[(?P<mesh>[^\]]*)\](?:, device_ids=\([^ ]*\))? ?\{(?P<axes>[^}]*)\}")
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
# The die-to-die link between the two halves of a 7x chip has six times the bandwidth of a one-dimensional ICI
# link: page "TPU7x" of the Cloud TPU documentation. No figure is published for v4, and the same is taken.
DIE_TO_DIE_LINKS = 6


@dataclass(frozen=True, order=True)
class Collective:
    """One kind of operation between devices.

    Attributes:
        kind: one of `KINDS`.
        num_bytes: of the whole array on a device: what it gives, or what goes into a "reduce-scatter".
        group: devices that take part together.
    """

    kind: str
    num_bytes: int
    group: int


@dataclass(frozen=True)
class Sent:
    """The collectives of a program.

    Attributes:
        always: how often it has each in every run.
        sometimes: what is in loops and in branches, each counted once: a step's choice of tokens by top_k and
            top_p, log-probabilities, prompts' tokens to score.
    """

    always: Counter[Collective]
    sometimes: Counter[Collective]


def collectives_of(program: jax.stages.Compiled) -> Sent:
    """What a compiled program sends."""
    text = program.as_text()
    if text is None:
        raise RuntimeError("the compiler gives no text of the program")
    return read_collectives(text)


def read_collectives(text: str) -> Sent:
    """The same, of the program's text."""
    bodies, entry = _computations(text)
    always, reached = [entry], {entry}
    for name in always:
        for line in bodies[name]:
            for called in _CALLED.findall(line):
                if called in bodies and called not in reached:
                    reached.add(called)
                    always.append(called)
    sent = Sent(Counter(), Counter())
    for name, lines in bodies.items():
        counter = sent.always if name in reached else sent.sometimes
        counter.update(one for line in lines if (one := _read(line)) is not None)
    return sent


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a program by its name, and the name of the one that begins."""
    bodies, entry, lines = dict[str, list[str]](), "", list[str]()
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = bodies.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        else:
            lines.append(line)
    if not entry:
        raise RuntimeError("the compiler's text of the program has no entry")
    return bodies, entry


def _read(line: str) -> Collective | None:
    operation = _OPERATION.search(line)
    if operation is None:
        return None
    kind = operation["kind"]
    group = _group_of(line)
    sizes = [_bytes_of(shape) for shape in _SHAPE.finditer(operation["shapes"])]
    if operation["start"] and kind != "all-reduce":  # what goes in, what comes out, and counters
        sizes = [max(sizes)]
    factor = group if kind == "reduce-scatter" else 1
    return Collective(kind, sum(sizes) * factor, group)


def _bytes_of(shape: re.Match[str]) -> int:
    name = shape["dtype"]
    bits = 8 if name == "pred" else int(re.sub(r"\D", "", name) or 0)
    return math.prod(int(size) for size in shape["sizes"].split(",") if size) * bits // 8


def _group_of(line: str) -> int:
    if match := _AXES.search(line):
        sizes = {name: int(size) for name, size in _AXIS.findall(match["mesh"])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", match["axes"]))
    if match := _IOTA.search(line):
        return int(match[1])
    if match := _LISTED.search(line):
        return len(match[1].split(","))
    if "source_target_pairs=" in line:
        return 2
    raise ValueError(f"the compiler writes groups of devices in an unknown way: {line.strip()}")


@dataclass(frozen=True)
class Interconnect:
    """What the links between some devices of a slice can do.

    An operation over all of them splits its data over the dimensions of the box that they fill, and goes
    round a ring in each: with the bandwidth of one link, or of two where the dimension's ends are connected.
    (The same is in chapter 3 of "How to Scale Your Model", jax-ml.github.io/scaling-book.)

    Attributes:
        shape: chips along each dimension.
        devices_per_chip: which share the chip's links.
        link_gbytes_per_s: of a link, in one direction, in 10^9 bytes.
        hop_us: until what a chip sends begins to arrive at its neighbour.
        wraps: chips along a dimension from whose multiples on its ends are connected.
    """

    shape: tuple[int, ...]
    devices_per_chip: int
    link_gbytes_per_s: float
    hop_us: float
    wraps: int

    @classmethod
    def of(cls, slice_: Slice, num_devices: int, *, link_gbytes_per_s: float, hop_us: float) -> Interconnect:
        """That between the first devices of a slice."""
        kind = slice_.kind
        return cls(slice_.part(num_devices), kind.devices_per_chip, link_gbytes_per_s, hop_us, kind.wraps)

    @property
    def gbytes_per_s(self) -> float:
        """That a chip sends with while all take part."""
        return self.link_gbytes_per_s * sum(self._rings(size) for size in self.shape)

    @property
    def hops(self) -> int:
        """From one end to the other in every dimension."""
        return sum(size // 2 if self._rings(size) == 2 else size - 1 for size in self.shape)

    def _rings(self, size: int) -> int:
        if size == 1:
            return 0
        return 2 if size % self.wraps == 0 else 1

    def time_us(self, collective: Collective) -> float:
        """Of one operation, over all devices if its group is larger than a chip; links do nothing else."""
        if collective.group == 1 or collective.num_bytes == 0:
            return 0.0
        trips = 2 if collective.kind == "all-reduce" else 1  # to be added up, and to be told the sum
        num_chips = math.prod(self.shape)
        time_us = 0.0
        if self.devices_per_chip > 1:
            rate = DIE_TO_DIE_LINKS * self.link_gbytes_per_s
            share = 1 - 1 / min(self.devices_per_chip, collective.group)
            time_us += trips * (share * collective.num_bytes / (rate * 1e3) + self.hop_us)
        if num_chips > 1 and collective.group > self.devices_per_chip:
            if collective.kind == "collective-permute":
                return time_us + collective.num_bytes / (self.link_gbytes_per_s * 1e3) + self.hop_us
            share = 1 - 1 / num_chips
            time_us += trips * (
                share * collective.num_bytes / (self.gbytes_per_s * 1e3) + self.hops * self.hop_us
            )
        return time_us


def scaled(collectives: Counter[Collective], factor: float) -> Counter[Collective]:
    """The same operations on arrays of so many times the size: of a batch that is so many times as large."""
    found = Counter[Collective]()
    for one, count in collectives.items():
        found[replace(one, num_bytes=math.ceil(one.num_bytes * factor))] += count
    return found
