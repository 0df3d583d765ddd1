"""What a kernel spills: values that lie in vector memory for want of registers, and what they are for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

STORE = re.compile(r"vst[\w.]* \[vmem:\[(#\w+_spill)\][^%]*(%v\w+)")
LOAD = re.compile(r"(%v\w+) = vld[\w.]* \[vmem:\[(#\w+_spill)\]")
DEFINITION = re.compile(r"\s*(%v\w+) = ([a-z][\w.]*)")
OPCODE = re.compile(r"\s*(?:%\w+ = )?([a-z][\w.]*)")
NAME = re.compile(r"%v\w+")
SUM = "vadd.f32"
TERMS = ("vld", "vmul.f32", "vpop.f32.mr")  # the last are of the matrix unit


@dataclass(frozen=True)
class Spill:
    """A vector register that is spilled.

    Attributes:
        made_by: the opcode whose result it holds, like "vpop.f32.mrf.mxu0" (of the matrix unit).
        used_by: the opcodes that read it, sorted, each once.
    """

    made_by: str
    used_by: tuple[str, ...]

    @property
    def is_accumulator(self) -> bool:
        """Whether it is a running sum of float32, or a term of one: the sum before, rescaled, or a product.

        Weights, which are summed too, are none, nor are the largest scores.
        """
        term = self.made_by.startswith(TERMS) and SUM in self.used_by
        return term or self.made_by == SUM


def find_spills(bodies: Sequence[str]) -> tuple[tuple[int, Spill], ...]:
    """The spills of a program, each with its bundle.

    Args:
        bodies: the text of each bundle, without comments.
    """
    bundles = [body.split(";;") if "%v" in body else [] for body in bodies]
    found = list[tuple[int, str]]()  # bundle, and the value that is spilled there
    held = dict[str, int]()  # place in vector memory -> the spill that it holds, as the program is written
    readers: defaultdict[str, list[int]] = defaultdict(list)  # value -> spills that it is one of
    makers = dict[str, str]()
    for at, bundle in enumerate(bundles):
        for text in bundle:
            if stored := STORE.search(text):
                held[stored[1]] = len(found)
                readers[stored[2]].append(len(found))
                found.append((at, stored[2]))
            elif (loaded := LOAD.search(text)) and loaded[2] in held:
                readers[loaded[1]].append(held[loaded[2]])
            if defined := DEFINITION.match(text):
                makers[defined[1]] = defined[2]
    uses = [set[str]() for _ in found]
    for bundle in bundles:
        for text in bundle:
            opcode = OPCODE.match(text)
            if opcode is None or STORE.search(text):
                continue
            result = DEFINITION.match(text)
            for name in NAME.findall(text, result.end() if result else 0):
                for spill in readers.get(name, ()):
                    uses[spill].add(opcode[1])
    return tuple(
        (at, Spill(makers.get(value, "unknown"), tuple(sorted(used))))
        for (at, value), used in zip(found, uses, strict=True)
    )
