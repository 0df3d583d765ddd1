"""Runs the control flow of a kernel's schedule over actual metadata, cycle by cycle, and times its copies.

A TPU kernel's branches, copies and waits depend on integers alone: lengths, page tables, semaphores. So the
scalar half of its program can be executed anywhere, and says which bundles a TensorCore would issue, which
copies it would start when, and how long it would wait for them. Vector instructions are not executed; the
bundles that hold them pass like any other, one a cycle.

The memory: copies are served one after another, in the order of their starts, each for its bytes over the
bandwidth and a fixed cost; a copy has arrived a latency after it was served.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import numpy as np

from .schedule import DELAY_SLOTS, Schedule, ScheduleError
from .translate import FIRST_ALLOCATION, HELPERS, UNKNOWN, ReplayError, Translator, number_and_place

GRANULE = {"v4": 512, "v5e": 32, "v5p": 32, "v6e": 32, "7x": 32}  # bytes, in which copies count
CORE_ID = "#allocation0"  # where chips with two cores that work as one keep it; the first core is replayed
MOST_PIECES = 10**7  # straight pieces of program after which a kernel is taken to hang


@dataclass(frozen=True)
class Memory:
    """What a copy costs.

    Attributes:
        bytes_per_cycle: bandwidth of HBM.
        latency: cycles from the end of a copy's service to its arrival.
        copy_cost: cycles of service that a copy takes besides its bytes.
    """

    bytes_per_cycle: float
    latency: float
    copy_cost: float = 0.0


@dataclass
class Replay:
    """What happened.

    Attributes:
        cycles: from the first bundle to the last.
        issued: of these, cycles in which a bundle was issued; in the others the core waited.
        busy: cycles in which the memory was serving.
        copies, bytes: copies between HBM and the core, and what they moved.
        visits: per bundle, how often a straight piece of program began there, and the bundles it issued.
    """

    cycles: float = 0.0
    issued: int = 0
    busy: float = 0.0
    copies: int = 0
    bytes: int = 0
    visits: dict[int, tuple[int, int]] = field(default_factory=dict[int, "tuple[int, int]"])


def replay(schedule: Schedule, operands: Sequence[np.ndarray | None], memory: Memory) -> Replay:
    """Replays a program.

    Args:
        schedule: of one kernel.
        operands: the kernel's, in order; int32 arrays where the program's way depends on them, else None.
        memory: what copies cost.

    Raises:
        ReplayError: the program holds an unknown instruction, reads what nobody wrote, or would hang.
    """
    core = _Core(schedule, operands, memory)
    core.run()
    return core.replay


class _Core:
    """The state of a TensorCore's scalar unit.

    Straight pieces of program are translated to Python functions when they are first reached. A function gets
    the cycle of its first bundle and returns the cycle behind its last one, and the next bundle.
    """

    def __init__(self, schedule: Schedule, operands: Sequence[np.ndarray | None], memory: Memory) -> None:
        self.schedule, self.memory, self.replay = schedule, memory, Replay()
        self.granule, self.delay = GRANULE[schedule.chip], DELAY_SLOTS[schedule.chip]
        self.operands = operands
        self.translator = Translator()
        self.scalars: dict[int, int] = {}  # scalar memory by address, and the values that wait to be popped
        self.served = 0.0  # until when the memory is busy
        self.arrived: defaultdict[int, int] = defaultdict(int)  # semaphores by address
        self.arriving: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
        self.values: defaultdict[str, Any] = defaultdict(lambda: UNKNOWN)  # of names and registers
        self.scalars[self.translator.allocation(CORE_ID)] = 0
        self.names = {"v": self.values, "mem": self.scalars, "core": self, **HELPERS}

    def run(self) -> None:
        pieces: dict[int, Callable[[float], tuple[float, int]]] = {}
        lengths: dict[int, int] = {}
        counts: defaultdict[int, int] = defaultdict(int)
        at, now = 0, 0.0
        end = len(self.schedule.bundles)
        for _ in range(MOST_PIECES):
            if at >= end:
                break
            if at not in pieces:
                pieces[at], lengths[at] = self._translate(at)
            counts[at] += 1
            now, at = pieces[at](now)
        else:
            raise ReplayError(f"the program has not ended after {MOST_PIECES} branches, at bundle {at}")
        self.replay.cycles = now
        self.replay.visits = {at: (count, lengths[at]) for at, count in counts.items()}
        self.replay.issued = sum(count * length for count, length in self.replay.visits.values())

    # What a translated piece calls.

    def load(self, address: Any) -> Any:
        """What lies at an address; schedules also load ahead what is then not used."""
        return UNKNOWN if address is UNKNOWN else self.scalars.get(address, UNKNOWN)

    def operand(self, index: int) -> int:
        """A scalar operand's value."""
        array = self.operands[index]
        if array is None:
            raise ReplayError(f"operand {index} decides where the program goes, but is not given")
        return int(array.reshape(-1)[0])

    def copy(self, now: float, kind: str, *, source: int, granules: int, target: int, flag: int) -> None:
        """Starts a copy; `kind` names its ends."""
        arrival = now
        if "hbm" in kind:
            moved = granules * self.granule * (2 if kind == "hbm_to_hbm" else 1)
            service = moved / self.memory.bytes_per_cycle + self.memory.copy_cost
            self.served = max(self.served, now) + service
            arrival = self.served + self.memory.latency
            self.replay.busy += service
            self.replay.copies += 1
            self.replay.bytes += moved
        heappush(self.arriving[flag], (arrival, granules))
        if kind.endswith("_to_smem"):
            self._fill(source, target, granules * self.granule // 4)

    def _fill(self, source: int, target: int, count: int) -> None:
        operand, place = number_and_place(source)
        array = self.operands[operand]
        if array is None:
            raise ReplayError(f"operand {operand} is copied to scalar memory, but is not given")
        begin = place * self.granule // 4
        for i, value in enumerate(array.reshape(-1)[begin : begin + count].tolist()):
            self.scalars[target + i] = value

    def wait(self, now: float, flag: int, granules: int) -> float:
        """The cycle at which a semaphore has reached a value."""
        arriving = self.arriving[flag]
        while self.arrived[flag] < granules or (arriving and arriving[0][0] <= now):
            if not arriving:
                raise ReplayError(
                    f"{_place(flag)} stands at {self.arrived[flag]} and nothing is under way to it: "
                    f"waiting for {granules} would never end"
                )
            arrival, more = heappop(arriving)
            self.arrived[flag] += more
            now = max(now, arrival)
        return now

    def halt(self) -> None:
        raise ReplayError("the program stops with an error")

    def _translate(self, first: int) -> tuple[Callable[[float], tuple[float, int]], int]:
        """The piece of program from bundle `first` to the next branch, and its bundles."""
        bundles, lines = self.schedule.bundles, list[str]()
        last, branch = len(bundles) - 1, None
        at = first
        while at <= last:
            # where ways into a loop meet, registers are read as they were before the bundle
            for instruction in sorted(bundles[at], key=lambda i: i.opcode != "sphi"):
                if instruction.opcode != "sbr.rel":
                    lines += self.translator.lines(instruction, at - first)
                    continue
                if branch is not None:
                    raise ScheduleError(f"bundle {at}: a branch in the delay slots of another")
                branch, last = int(instruction.operands[0]), min(last, at + self.delay)
                lines.append(f"taken = {self.translator.condition(instruction) or True}")
            at += 1
        length = last - first + 1
        following = f"({branch} if taken else {last + 1})" if branch is not None else str(last + 1)
        body = "".join(f" {line}\n" for line in [*lines, f"return now + {length}, {following}"])
        local: dict[str, Any] = {}
        exec(f"def piece(now):\n{body}", self.names, local)
        return local["piece"], length


def _place(address: int) -> str:
    number, place = number_and_place(address)
    return f"allocation {number - FIRST_ALLOCATION} + {place}"
