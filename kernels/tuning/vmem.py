"""The TPU compiler's report of vector memory, read from its dump: one page, with JSON in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = "const DATA ="
SPILL = "SPILL"


@dataclass(frozen=True)
class VectorMemory:
    """What a kernel has of vector memory.

    Attributes:
        bytes: all that the compiler allots to it: scratch, windows of inputs and outputs, spilled registers.
        spilled_bytes: of these, for registers that are spilled anywhere in the kernel.
    """

    bytes: int
    spilled_bytes: int


def read_vector_memory(folder: Path) -> dict[str, VectorMemory]:
    """By the name of the Pallas kernel, of all whose dumps lie in a folder."""
    found = dict[str, VectorMemory]()
    for path in folder.glob("*-vmem_report.html"):
        text = path.read_text()
        begin = text.index(DATA) + len(DATA)
        report: dict[str, Any] = json.JSONDecoder().raw_decode(text, begin)[0]
        for operation in report["hlo_breakdowns"].values():
            scopes = operation["metadata"].rstrip('"').split("/")
            if scopes[-1] != "pallas_call":
                continue
            parts = [part for block in operation["blocks"] for part in block["allocations"]]
            spilled = sum(part["size"] for part in parts if part["tag"] == SPILL)
            found[scopes[-2]] = VectorMemory(operation["total_size"], spilled)
    return found
