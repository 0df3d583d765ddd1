"""What the devices of a compiled program send each other."""

from __future__ import annotations

import math
import re
from collections import Counter

import jax
import numpy as np

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
OPERATION = re.compile(rf"= (?P<shapes>.*?) (?P<kind>{KINDS})(-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


# How XLA writes groups of devices: {{0,1},{2,3}}, or [2,2]<=[4], or mesh['axis_0'=2,'axis_1'=2] {'axis_1'};
# of a mesh whose devices are in another order, mesh[…], device_ids=([2,2]T(1,0)) {'axis_1'}.
LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
ON_A_MESH = re.compile(
    r"replica_groups=mesh\[(?P<sizes>.*?)\](?:, device_ids=\(\[(?P<dims>[\d,]+)\]T\((?P<order>[\d,]+)\)\))?"
    r" \{(?P<axes>['\w,]+)\}"
)


def groups(program: jax.stages.Compiled) -> set[frozenset[int]]:
    """The groups of devices, by their places in the mesh, that send each other anything."""
    text = program.as_text()
    assert text is not None
    lines = [line for line in text.splitlines() if OPERATION.search(line)]
    return {frozenset(group) for line in lines for group in _groups_in(line)}


def _groups_in(line: str) -> list[list[int]]:
    if listed := LISTED.search(line):
        return [_numbers(group) for group in re.findall(r"[\d,]*\d", listed[1])]
    if counted := COUNTED.search(line):
        dims = _numbers(counted[2])
        order = _numbers(counted[3]) if counted[3] else range(len(dims))
        devices = np.arange(math.prod(dims)).reshape(dims).transpose(*order)
        return devices.reshape(_numbers(counted[1])).tolist()
    on_a_mesh = ON_A_MESH.search(line)
    assert on_a_mesh is not None, line
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", on_a_mesh["sizes"])}
    along = [list(sizes).index(name) for name in re.findall(r"\w+", on_a_mesh["axes"])]
    devices = np.arange(math.prod(sizes.values()))
    if on_a_mesh["dims"]:
        devices = devices.reshape(_numbers(on_a_mesh["dims"])).transpose(_numbers(on_a_mesh["order"]))
    devices = devices.reshape(*sizes.values())
    size = math.prod(devices.shape[axis] for axis in along)
    return np.moveaxis(devices, along, range(-len(along), 0)).reshape(-1, size).tolist()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def collectives(program: jax.stages.Compiled) -> Counter[tuple[str, int]]:
    """How often each kind of operation gives an array of so many numbers on a device."""
    text = program.as_text()
    assert text is not None
    found = Counter[tuple[str, int]]()
    for operation in OPERATION.finditer(text):
        for sizes in SHAPE.findall(operation["shapes"]):
            found[operation["kind"], math.prod(int(size) for size in sizes.split(",") if size)] += 1
    return found
