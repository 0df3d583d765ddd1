"""What every test runs under: shapes and dtypes checked on every call, nothing promoted silently.

`--jaxtyping-packages` (pyproject.toml) has jaxtyping and beartype check each annotated function where there
are arrays; a test per room proves that they do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs need not be fast here, and most of the suite's time is compilation. By the last flag fusions become
# plainer code, and a step of the engine compiles in three quarters of the time. Later versions may not know
# it, and XLA ends a process that has an unknown flag.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded in a test

import jax
import jaxtyping
import pytest

from .devices import TP

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if TP > 1:
    jax.config.update("jax_num_cpu_devices", TP)


@pytest.fixture
def no_type_checker() -> Iterator[None]:
    """Turns the type checker off, for tests of our own checks of shapes, which come after it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def small_units() -> Iterator[None]:
    """Has the Pallas kernels choose small block sizes: larger ones take the interpreter far longer."""
    from vsurge.kernels.decode import blocks
    from vsurge.kernels.gpu import blocks as gpu_blocks
    from vsurge.kernels.ragged import blocks as ragged_blocks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "UNIT_TOKENS", 128)
        patch.setattr(blocks, "MOST_LANES", 1)
        patch.setattr(ragged_blocks, "MOST_QUERIES", 32)
        patch.setattr(ragged_blocks, "MOST_TOKENS", 256)
        patch.setattr(gpu_blocks, "DECODE", gpu_blocks.TritonDecodeBlocks(programs=8))
        patch.setattr(gpu_blocks, "RAGGED", gpu_blocks.TritonRaggedBlocks(rows=32))
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many of the faults put into kernels were noticed; here, where it is heard of all processes."""
    outcomes = {
        outcome: sum("test_a_fault_is_noticed" in getattr(report, "nodeid", "") for report in reports)
        for outcome, reports in terminalreporter.stats.items()
        if outcome in ("passed", "failed")
    }
    if total := sum(outcomes.values()):
        terminalreporter.write_line(f"kernel faults noticed: {outcomes.get('passed', 0)} of {total}")
