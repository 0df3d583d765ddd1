"""A peer in a process of its own: on a GPU, of whose memory jax's pool takes three quarters in this one, and
vLLM anywhere.

`python -m vsurge.benchmarks.engine.apart FILE` reads what is wanted from its standard input, a pickle of
`Wanted`, and writes the seconds into the file.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...model import Qwen3Config
from .load import LoadRequest, shortened
from .peers import PEERS

TIMEOUT_S = 600  # of all that a peer does, its weights and what it compiles among it


@dataclass(frozen=True)
class Wanted:
    """A peer's name, the shape, the requests that count, and the sequences that are decoded together."""

    name: str
    config: Qwen3Config
    requests: Sequence[LoadRequest]
    at_once: int
    device: str

    def run(self) -> float:
        """Seconds of all requests, after some that warm up."""
        longest = max(len(request.prompt) + request.output_tokens for request in self.requests)
        run = PEERS[self.name][1](self.config, self.at_once, longest, self.device)
        run(shortened(self.requests[: self.at_once]))
        return run(self.requests)


def run_apart(wanted: Wanted) -> float:
    """`wanted.run()` by another process, in which jax is kept from the GPU unless the peer is in jax.

    Raises:
        RuntimeError: the process fails; with the last line that it said.
        subprocess.TimeoutExpired: it takes more than `TIMEOUT_S`.
    """
    others = {} if wanted.name == "EasyDeL" else {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        seconds = Path(folder) / "seconds"
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(seconds)], input=pickle.dumps(wanted),
            env=os.environ | others, capture_output=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise RuntimeError(said[-1] if said else f"ended with {done.returncode} and said nothing")
        return float(seconds.read_text())


def gpu_is_here() -> bool:
    """Whether jax's default device is an NVIDIA GPU; this process's jax is not asked, and takes no memory."""
    if shutil.which("nvidia-smi") is None:
        return False
    asked = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"],
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return asked.stdout.split()[-1:] == ["gpu"]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(str(pickle.loads(sys.stdin.buffer.read()).run()))
