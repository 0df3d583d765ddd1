"""The TPU compiler's schedule of a kernel, read from its dumps.

A TensorCore issues one bundle of instructions a cycle, in order. The compiler writes its schedule down twice:
the final one leaves out most bundles that only wait for a result (they become a delay in the bundle before),
the one before has them all. The second counts cycles: a bare product of 1024 x 1024 matrices then runs at
99 % (v5e), 93 % (v6e) and 93 % (7x) of the matrix unit's peak, by the first at 108 %, 94 % and 171 %.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .spills import Spill, find_spills
from .vmem import VectorMemory, read_vector_memory

# Bundles behind a branch that are executed whether it is taken or not, as the schedules show.
DELAY_SLOTS = {"v4": 1, "v5e": 4, "v5p": 4, "v6e": 4, "7x": 6}
GRANULE = {"v4": 512, "v5e": 32, "v5p": 32, "v6e": 32, "7x": 32}  # bytes, in which copies count

BUNDLE = re.compile(
    r"^ *(?:0x[0-9a-f]+|0) +(?:(?:LH|LB|LE|PB|PF|CT) *)?: *(?:> *)*\{(.*?)\} *$", re.MULTILINE | re.DOTALL
)
COMMENT = re.compile(r"/\*(?:(?!/\*).)*?\*/", re.DOTALL)  # one that holds no other
ANNOTATION = re.compile(r"\[(?:resolvable|thread):[^\]]*\]|(?<=\w) \[#\w+\]$")
INSTRUCTION = re.compile(r"(?:(%\w+) = )?([a-z][\w.]*) *(.*)", re.DOTALL)
PREDICATE = re.compile(r"\((!?%p\w+)(?:, *(%\w+))?\),? *")
TARGET = re.compile(r"bundleno = (\d+)")
# What decides where the program goes: the scalar unit, copies, and their semaphores.
CONTROL = re.compile(r"s[a-z]|p[a-z]|dma\.|vsync|int_to_ptr|inlined_call_operand|vpop\.sfrf")
REMAINDER = "/* kRem */"


class ScheduleError(RuntimeError):
    """The compiler's dumps hold something that this reader does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of the scalar unit, of a copy or of a semaphore.

    Attributes:
        opcode: like "sadd.s32".
        result: the value's name, or None.
        operands: names, numbers and addresses, as written.
        predicate: the name of the condition under which it is executed, with "!" for its opposite; or None.
        otherwise: the name of what the result is if it is not executed; or None.
        remainder: of a division, whether the remainder is wanted and not the quotient.
    """

    opcode: str
    result: str | None
    operands: tuple[str, ...]
    predicate: str | None = None
    otherwise: str | None = None
    remainder: bool = False


@dataclass(frozen=True)
class Loop:
    """Consecutive bundles that a branch backwards repeats.

    Attributes:
        first, last: bundles, the branch's delay slots included.
        depth: loops around it.
        slots: slots used by each unit in all its bundles, see `Schedule.capacity`.
        copies: bytes of each instruction that starts a copy; None where they are computed.
    """

    first: int
    last: int
    depth: int
    slots: dict[str, int]
    copies: tuple[int | None, ...]

    @property
    def bundles(self) -> int:
        """Bundles of a trip that leaves out nothing, inner loops taken once."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Schedule:
    """A kernel's program for one TensorCore.

    Attributes:
        kernel: its name.
        chip: one of `CHIPS`.
        bundles: per bundle, and so per cycle, its instructions that decide where the program goes.
        empty: per bundle, whether it only waits; the final program leaves out nearly all of these.
        capacity: slots of each unit in a bundle; "VLOAD:FILL" and "VSTORE:SPILL" count those loads and
            stores that spill registers.
        used: per bundle, the slots used, in the order of `capacity`.
        vector_memory: what the compiler allots to the kernel; None if it does not say.
        spills: the vector registers that are spilled, each with its bundle.
    """

    kernel: str
    chip: str
    bundles: tuple[tuple[Instruction, ...], ...]
    empty: tuple[bool, ...]
    capacity: dict[str, int]
    used: tuple[tuple[int, ...], ...]
    vector_memory: VectorMemory | None = None
    spills: tuple[tuple[int, Spill], ...] = ()

    def slots(self, first: int, last: int) -> dict[str, int]:
        """Slots used by each unit from bundle `first` to `last`."""
        rows = self.used[first : last + 1]
        return dict(zip(self.capacity, (sum(column) for column in zip(*rows, strict=True)), strict=True))

    def copies(self, first: int, last: int) -> tuple[int | None, ...]:
        """Bytes of each instruction from bundle `first` to `last` that starts a copy; None if computed."""
        sizes = (
            instruction.operands[1]
            for bundle in self.bundles[first : last + 1]
            for instruction in bundle
            if is_copy(instruction)
        )
        return tuple(int(size) * GRANULE[self.chip] if size.isdecimal() else None for size in sizes)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All loops, in the order of their first bundles."""
        delay = DELAY_SLOTS[self.chip]
        spans = sorted((target, at + delay) for at, target in self._branches() if target <= at)
        return tuple(
            Loop(
                first,
                last,
                sum(a <= first and last <= b for a, b in spans) - 1,
                self.slots(first, last),
                self.copies(first, last),
            )
            for first, last in spans
        )

    def _branches(self) -> Iterator[tuple[int, int]]:
        """(bundle, target) of each branch."""
        for at, bundle in enumerate(self.bundles):
            for instruction in bundle:
                if instruction.opcode == "sbr.rel":
                    yield at, int(instruction.operands[0])


def is_copy(instruction: Instruction) -> bool:
    """Whether an instruction starts a copy."""
    return instruction.opcode.startswith("dma.") and not instruction.opcode.startswith("dma.done")


def read_schedules(folder: Path, chip: str) -> list[Schedule]:
    """The schedules of all Pallas kernels whose dumps lie in a folder, in the order of compilation.

    Raises:
        ScheduleError: a dump is not in the known format.
    """
    found, memory = list[Schedule](), read_vector_memory(folder)
    for path in sorted(folder.glob("*-packed-bundles-post-ra.txt")):
        stem = re.fullmatch(r"(\d+-(.+?)(?:\.\d+)?)-\d+-packed-bundles-post-ra", path.stem)
        if "schedule-analysis" in path.name or stem is None or stem[2] == "TLP" or "<" in stem[2]:
            continue
        analysis = _one(folder, f"{stem[1]}-*-schedule-analysis_packed-bundles-post-ra.txt")
        if "tpu_custom_call" not in analysis:
            continue  # a fusion of XLA's own
        bodies = BUNDLE.findall(_without_comments(path.read_text().replace(REMAINDER, ", remainder")))
        capacity, used = _utilization(
            _one(folder, f"{stem[1]}-*-pre-delay_hlo-static-per-bundle-utilization.txt")
        )
        if len(used) != len(bodies):
            raise ScheduleError(f"{path.name}: {len(bodies)} bundles, but utilization of {len(used)}")
        bundles, empty = tuple(map(_bundle, bodies)), tuple(not body.strip() for body in bodies)
        rest = memory.get(stem[2]), find_spills(bodies)
        found.append(Schedule(stem[2], chip, bundles, empty, capacity, used, *rest))
    return found


def _one(folder: Path, pattern: str) -> str:
    """The text of the only file of a name."""
    paths = list(folder.glob(pattern))
    if len(paths) != 1:
        raise ScheduleError(f"{len(paths)} dumps are named {pattern}, expected one")
    return paths[0].read_text()


def _without_comments(text: str) -> str:
    found = 1
    while found:
        text, found = COMMENT.subn("", text)
    return text


def _bundle(body: str) -> tuple[Instruction, ...]:
    parts = (_instruction(part.strip()) for part in body.split(";;"))
    return tuple(part for part in parts if part is not None)


def _instruction(text: str) -> Instruction | None:
    """An instruction of CONTROL; None for any other."""
    matched = INSTRUCTION.fullmatch(text)
    if matched is None or not CONTROL.match(matched[2]):
        return None
    result, opcode, rest = matched.groups()
    rest = ANNOTATION.sub("", rest).strip()
    predicate = PREDICATE.search(rest)
    if predicate:
        rest = (rest[: predicate.start()] + rest[predicate.end() :]).strip()
    if opcode == "sbr.rel":
        target = TARGET.search(rest)
        if target is None:
            raise ScheduleError(f"a branch without a target: {text}")
        operands = [target[1]]
    elif opcode.startswith("inlined_call_operand"):
        operands = re.findall(r"index: (\d+)", rest)
    elif opcode == "sst":
        operands = list(re.fullmatch(r"(\[smem:.*\]) (\S+)", rest, re.DOTALL).groups())  # pyright: ignore
    else:
        operands = [part.strip() for part in rest.split(",") if part.strip()]
    remainder = operands[-1:] == ["remainder"]
    return Instruction(
        opcode,
        result,
        tuple(operands[:-1] if remainder else operands),
        predicate[1] if predicate else None,
        predicate[2] if predicate else None,
        remainder,
    )


def _utilization(text: str) -> tuple[dict[str, int], tuple[tuple[int, ...], ...]]:
    """Slots of each unit, and those used per bundle."""
    lines = text.splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    capacity = dict(zip(units, (int(number) for number in lines[2].split()), strict=True))
    return capacity, tuple(
        tuple(int(number) for number in line.split()) for line in lines[4:] if line.strip()
    )
