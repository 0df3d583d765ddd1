"""The bookkeeping is plain Python."""

from __future__ import annotations

import subprocess
import sys

FREE_OF_JAX = (
    "channel", "checks", "deadlines", "detokenizer", "errors", "generation", "guided", "guided_params",
    "inbox", "meter", "metrics", "page_pool", "prompts", "replica", "request", "sampling_params",
    "scheduler", "step_plan", "token_logprobs", "token_mask",
)  # fmt: skip


def test_the_bookkeeping_works_where_jax_cannot_be_imported() -> None:
    # The package's own __init__ imports the engine, so a bare package stands in for it.
    script = f"""
import importlib, pathlib, sys, types
sys.modules["jax"] = sys.modules["vsurge.model"] = sys.modules["vsurge.kernels"] = None
import vsurge
room = types.ModuleType("vsurge.runtime")
room.__path__ = [str(pathlib.Path(vsurge.__file__).parent / "runtime")]
sys.modules["vsurge.runtime"] = room
for name in {FREE_OF_JAX}:
    importlib.import_module("vsurge.runtime." + name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
