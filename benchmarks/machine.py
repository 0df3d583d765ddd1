"""The machine that a benchmark ran on: name, versions, and how fast its memory and matrix units are."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "libtpu", "numpy", "torch", "transformers", "vsurge")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, versions and commit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    text = cpuinfo.read_text()
    name = next(
        (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "?"
    )
    extensions = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in text]
    return f"{name} ({', '.join(extensions)})"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout.strip() or None


def seconds_of(call: Callable[[], Any], *, repeats: int) -> list[float]:
    """Seconds of each of several calls, after one that does not count."""
    call()
    samples: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def measure_ceilings(*, repeats: int = 7) -> dict[str, float]:
    """What the default device does at best, by XLA: reading memory, and a bfloat16 matrix product.

    Returns:
        bandwidth_gb_s: the largest element of 1 GB of int32, bytes read over the median time.
        matrix_gflop_s: [1024, 2048] x [2048, 2048] in bfloat16 with float32 result, operations over the
            median time.
    """
    import jax
    import jax.numpy as jnp

    array = jnp.ones((250_000_000,), jnp.int32)
    largest = jax.jit(jnp.max)
    bandwidth = array.nbytes / statistics.median(
        seconds_of(lambda: largest(array).block_until_ready(), repeats=repeats)
    )
    del array
    left, right = jnp.ones((1024, 2048), jnp.bfloat16), jnp.ones((2048, 2048), jnp.bfloat16)

    @jax.jit
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    seconds = statistics.median(
        seconds_of(lambda: product(left, right).block_until_ready(), repeats=3 * repeats)
    )
    return {"bandwidth_gb_s": bandwidth / 1e9, "matrix_gflop_s": 2 * 1024 * 2048 * 2048 / seconds / 1e9}
