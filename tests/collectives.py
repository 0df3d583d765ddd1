"""What the devices of a compiled program send each other."""

from __future__ import annotations

import math
import re
from collections import Counter

import jax

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
OPERATION = re.compile(rf"= (?P<shapes>.*?) (?P<kind>{KINDS})(-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def collectives(program: jax.stages.Compiled) -> Counter[tuple[str, int]]:
    """How often each kind of operation gives an array of so many numbers on a device."""
    text = program.as_text()
    assert text is not None
    found = Counter[tuple[str, int]]()
    for operation in OPERATION.finditer(text):
        for sizes in SHAPE.findall(operation["shapes"]):
            found[operation["kind"], math.prod(int(size) for size in sizes.split(",") if size)] += 1
    return found
