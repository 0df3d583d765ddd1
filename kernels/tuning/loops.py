"""A kernel's loops as they were executed: trips, bundles per trip, and how full the bundles were."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .replay import Replay
from .schedule import Loop, Schedule
from .spills import Spill

SPILLED, FILLED = "VSTORE:SPILL", "VLOAD:FILL"  # units of `Schedule.capacity`


@dataclass(frozen=True)
class Work:
    """What was issued in a part of a program.

    Attributes:
        bundles: that were issued.
        slots: used of each unit in them.
        capacity: slots of each unit in a bundle.
    """

    bundles: int
    slots: dict[str, int]
    capacity: dict[str, int]

    def share(self, unit: str) -> float:
        """How full a unit's slots were."""
        return self.slots[unit] / (self.bundles * self.capacity[unit]) if self.bundles else 0.0

    @property
    def spills(self) -> int:
        """Registers that were spilled, and filled again."""
        return self.slots.get(SPILLED, 0) + self.slots.get(FILLED, 0)


@dataclass(frozen=True)
class LoopRun:
    """One loop's part in a replay.

    Attributes:
        loop: where it stands.
        trips: how often it was gone through.
        work: in all of them, inner loops included.
        copies, copied_bytes: instructions issued in it that start a copy, whether their condition held or
            not, and the bytes of those whose size the program holds.
    """

    loop: Loop
    trips: int
    work: Work
    copies: int
    copied_bytes: int

    @property
    def bundles_per_trip(self) -> float:
        return self.work.bundles / self.trips


class Execution:
    """How often each bundle of a program was issued."""

    def __init__(self, schedule: Schedule, happened: Replay) -> None:
        self.schedule, self.happened = schedule, happened
        changes = np.zeros(len(schedule.bundles) + 1, np.int64)
        for begin, (count, length) in happened.visits.items():
            changes[begin] += count
            changes[begin + length] -= count
        self.times = np.cumsum(changes)[:-1]

    def work(self, first: int = 0, last: int | None = None) -> Work:
        """What was issued from bundle `first` to `last`, by default in the whole program."""
        schedule, end = self.schedule, len(self.times) if last is None else last + 1
        times = self.times[first:end]
        slots = times @ np.asarray(schedule.used[first:end], np.int64)
        by_unit = dict(zip(schedule.capacity, slots.tolist(), strict=True))
        return Work(int(times.sum()), by_unit, schedule.capacity)

    def busiest(self) -> Work:
        """What was issued in the straight piece of program that took most."""
        pieces = self.happened.visits.items()
        first, (_, length) = max(pieces, key=lambda piece: piece[1][0] * piece[1][1])
        return self.work(first, first + length - 1)

    def loops(self) -> tuple[LoopRun, ...]:
        """The loops that were gone through, the one with the most bundles of its own first."""
        runs = [self._run(loop) for loop in self.schedule.loops if self.times[loop.first]]

        def own(run: LoopRun) -> int:
            first, last, depth = run.loop.first, run.loop.last, run.loop.depth
            inner = (
                other.work.bundles
                for other in runs
                if other.loop.depth == depth + 1 and first <= other.loop.first and other.loop.last <= last
            )
            return run.work.bundles - sum(inner)

        return tuple(sorted(runs, key=own, reverse=True))

    def spills(self) -> Counter[Spill]:
        """How often each kind of register was spilled."""
        counts = Counter[Spill]()
        for at, spill in self.schedule.spills:
            if self.times[at]:
                counts[spill] += int(self.times[at])
        return counts

    def _run(self, loop: Loop) -> LoopRun:
        copies = num_bytes = 0
        for at in range(loop.first, loop.last + 1):
            if self.times[at] and (sizes := self.schedule.copies(at, at)):
                copies += len(sizes) * int(self.times[at])
                num_bytes += sum(size or 0 for size in sizes) * int(self.times[at])
        work = self.work(loop.first, loop.last)
        return LoopRun(loop, int(self.times[loop.first]), work, copies, num_bytes)
