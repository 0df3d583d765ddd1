"""A directory of their own for what the commands write, and ways to run a command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vsurge.cli import main

from ..compilation_cache import cache_reset


@pytest.fixture(scope="package")
def vsurge_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """VSURGE_HOME, one for all tests here, so that they share compiled programs; jax is reset afterwards."""
    home = tmp_path_factory.mktemp("vsurge_home")
    with pytest.MonkeyPatch.context() as patch, cache_reset():
        patch.setenv("VSURGE_HOME", str(home))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        yield home


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], vsurge_home: Path) -> Callable[..., Finished]:
    """Runs a command in this process."""

    def run(*argv: str) -> Finished:
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return run


@pytest.fixture
def process(vsurge_home: Path) -> Callable[..., Finished]:
    """Runs a command in a process of its own, with the text that it finds on stdin."""

    def run(*argv: str, stdin: str = "") -> Finished:
        argv = (sys.executable, "-m", "vsurge", *argv)
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=120, check=False)
        return Finished(done.returncode, done.stdout, done.stderr)

    return run
