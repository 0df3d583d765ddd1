"""Where the commands keep what they write."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from vsurge.home import home_path, keep_compiled_programs

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def setting(name: str) -> Any:
    """One of jax's settings, which it does not declare to type checkers."""
    return getattr(jax.config, name)


@pytest.fixture(autouse=True)
def jax_config_as_before() -> Iterator[None]:
    before = {name: setting(name) for name in NAMES}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_home_is_chosen_by_variables_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("VSURGE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert home_path() == Path("/home/someone/.cache/vsurge")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert home_path() == Path("/home/someone/Library/Caches/vsurge")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/someone")
    assert home_path() == Path("/var/cache/someone/vsurge")
    monkeypatch.setenv("VSURGE_HOME", "~/elsewhere")
    assert home_path() == Path("/home/someone/elsewhere")


def test_compiled_programs_are_kept_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("VSURGE_HOME", str(tmp_path / "new" / "home"))
    keep_compiled_programs()
    assert setting("jax_compilation_cache_dir") == str(tmp_path / "new" / "home" / "compiled")
    assert setting("jax_persistent_cache_min_compile_time_secs") == 0
    assert list((tmp_path / "new" / "home").iterdir()) == [tmp_path / "new" / "home" / "compiled"]


def test_the_users_own_choice_for_jax_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = setting("jax_compilation_cache_dir")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("VSURGE_HOME", str(tmp_path))
    keep_compiled_programs()
    assert setting("jax_compilation_cache_dir") == before
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_written_to_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = setting("jax_compilation_cache_dir")
    (tmp_path / "file").touch()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("VSURGE_HOME", str(tmp_path / "file" / "home"))
    with caplog.at_level(logging.WARNING, "vsurge"):
        keep_compiled_programs()
    (record,) = caplog.records
    assert str(tmp_path / "file" / "home") in record.message
    assert "VSURGE_HOME" in record.message
    assert setting("jax_compilation_cache_dir") == before


def test_the_library_leaves_jax_and_the_home_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSURGE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    code = "import vsurge, vsurge.easydel, jax; vsurge.vSurge; print(jax.config.jax_compilation_cache_dir)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "None\n"
    assert list(tmp_path.iterdir()) == []
