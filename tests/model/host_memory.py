"""Prints what the host held while a checkpoint was loaded, as JSON: `python host_memory.py FOLDER [DTYPE]`.

A program of its own, as Python's memory is measured as a whole and other tests leave things in it.
"""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vsurge.model import checkpoint, load_model, safetensors_file


def mapped_bytes(file: Path) -> int:
    """Bytes of a file in this process's memory."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    ends = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return sum(stop - start for start, stop in ends)


def main(folder: str, dtype: str | None = None) -> None:
    file, mapped = Path(folder) / "model.safetensors", list[int]()

    def watched(items: Any, *_: Any, **__: Any) -> Iterator[Any]:
        for item in items:
            mapped.append(mapped_bytes(file))
            yield item

    checkpoint.progress_bar = watched
    safetensors_file.CHUNK_BYTES = 1 << 16
    load_model(folder, dtype=dtype)  # what jax keeps of a first call is not the weights'
    tracemalloc.start()
    load_model(folder, dtype=dtype)
    _, peak = tracemalloc.get_traced_memory()
    print(json.dumps({"peak": peak, "mapped": max(mapped), "mapped_at_the_end": mapped_bytes(file)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
