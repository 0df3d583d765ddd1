"""Which implementation runs, and what the room imports."""

from __future__ import annotations

import ast
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import vsurge.kernels
from vsurge.kernels import dispatch
from vsurge.kernels.dispatch import choose_implementation

AVAILABLE: tuple[dispatch.Implementation, ...] = ("xla", "reference")
ROOM = Path(vsurge.kernels.__file__).parent


@pytest.fixture(autouse=True)
def nothing_logged_before() -> Iterator[None]:
    dispatch._log_fallback_once.cache_clear()
    yield
    dispatch._log_fallback_once.cache_clear()


def test_a_cpu_gets_xla_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_implementation("some kernel", None, AVAILABLE) == "xla"
    assert caplog.records == []


def test_another_device_falls_back_with_one_line_per_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    caplog.set_level(logging.INFO, "vsurge.kernels")
    for kernel in ("first", "first", "second"):
        assert choose_implementation(kernel, None, AVAILABLE) == "xla"
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["first", "second"]
    assert "'tpu'" in caplog.text
    assert "falling back to 'xla'" in caplog.text


def test_a_tpu_gets_the_kernel_written_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose_implementation("some kernel", None, (*AVAILABLE, "mosaic_tpu")) == "mosaic_tpu"


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_implementation_that_a_kernel_lacks_is_refused_with_those_it_has(name: Any) -> None:
    with pytest.raises(
        ValueError, match=f"implementation='{name}': some kernel has 'xla', 'reference'; None chooses"
    ):
        choose_implementation("some kernel", name, AVAILABLE)


def test_the_room_imports_nothing_but_jax_numpy_and_jaxtyping() -> None:
    allowed = sys.stdlib_module_names | {"jax", "numpy", "jaxtyping"}
    for file in ROOM.rglob("*.py"):
        depth = len(file.relative_to(ROOM).parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in allowed, file
                assert "_src" not in (node.module or ""), file
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= depth, file  # no further up than the room itself


def test_the_room_can_be_lifted_out(tmp_path: Path) -> None:
    shutil.copytree(ROOM, tmp_path / "lifted", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys, lifted; sys.exit('vsurge' in sys.modules or len(lifted.__all__) < 8)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
