"""Tests on several devices, which are those of a process: what needs eight runs as a program of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

TP = int(os.environ.get("VSURGE_TEST_TP", "1"))  # how many the runtime's tests spread their model over


def simulate_devices(count: int = 8) -> None:
    """What such a program starts with: so many CPU devices, and no silent promotion of dtypes or ranks."""
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def printed_by(program: str, *arguments: str, timeout_s: float = 500) -> Any:
    """What `python -m PROGRAM ARGUMENTS…` prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", program, *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
