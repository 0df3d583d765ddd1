"""Importing costs nothing until something is used, and imports between the rooms point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsurge

ROOT = Path(__file__).parents[2]
LEVELS = {"kernels": 0, "model": 1, "runtime": 2, "benchmarks": 3, "vsurge": 4}
KERNELS_MAY_IMPORT = {"jax", "numpy", "jaxtyping", *sys.stdlib_module_names}


def loaded_after(code: str) -> set[str]:
    """Top-level modules in sys.modules after a fresh interpreter has run the code."""
    report = "import sys; print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    script = f"try:\n    {code}\nexcept SystemExit: pass\n{report}"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    return set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import vsurge",
        "import vsurge; vsurge.demo_model_path(); vsurge.__version__; dir(vsurge)",
        "from vsurge.cli import main; main(['--help'])",
        "from vsurge.cli import main; main(['generate', '--help'])",
        "from vsurge.cli import main; main(['tune', '--help'])",
        "from vsurge.cli import main; main(['plan', '--help'])",
        "from vsurge.cli import main; main(['bench', 'serve', '--help'])",
        "from vsurge.cli import main; main(['chat', '--no-such-option'])",
        "from vsurge.cli import main; main([])",
    ],
)
def test_neither_jax_nor_transformers_is_imported_before_it_is_needed(code: str) -> None:
    assert not loaded_after(code) & {"jax", "jaxlib", "numpy", "transformers", "huggingface_hub", "torch"}


def test_a_model_needs_jax_but_not_transformers() -> None:
    loaded = loaded_after("import vsurge; vsurge.load_model(vsurge.demo_model_path())")
    assert "jax" in loaded
    assert not loaded & {"transformers", "torch"}


def test_every_exported_name_resolves_and_is_listed() -> None:
    assert set(vsurge.__all__) <= set(dir(vsurge))
    for name in vsurge.__all__:
        assert getattr(vsurge, name) is getattr(vsurge, name)
    assert vsurge.vSurge is vsurge.runtime.vSurge  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = vsurge.no_such_name  # pyright: ignore[reportAttributeAccessIssue]


def test_type_checkers_and_editors_see_exactly_the_exported_names() -> None:
    tree = ast.parse(Path(vsurge.__file__).read_text(encoding="utf-8"))
    (guarded,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.name for n in guarded.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert seen == set(vsurge._ROOM_OF) == set(vsurge.__all__) - {"__version__", "demo_model_path"}


def test_the_demo_model_lies_in_the_package() -> None:
    assert (vsurge.demo_model_path() / "model.safetensors").is_file()


def sources(room: str) -> Iterator[Path]:
    for path in sorted((ROOT / room).rglob("*.py")):
        is_link = room == "vsurge" and path.relative_to(ROOT / room).parts[0] in LEVELS  # to the other rooms
        is_suite = (
            path.name.startswith("test_") or path.name == "conftest.py"
        )  # pytest imports it by its path
        if not (is_link or is_suite):
            yield path


def absolute_imports(path: Path, room: str, tree: ast.AST) -> Iterator[tuple[bool, str]]:
    """Every import of a module, as (was it written relative, absolute name of what is imported)."""
    prefix = () if room == "vsurge" else ("vsurge",)
    package = (*prefix, *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((False, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((False, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            module = (*base, *(node.module or "").split(".")) if node.module else base
            yield from ((True, ".".join((*module, alias.name))) for alias in node.names)


def violations(room: str, path: Path, code: str) -> list[str]:
    """What a file of a room imports that it may not."""
    tree = ast.parse(code)
    found: list[str] = []
    for relative, name in absolute_imports(path, room, tree):
        parts = name.split(".")
        if name.startswith("jax._src"):
            found.append(f"private: {name}")
        if parts[0] != "vsurge":
            if room == "kernels" and parts[0] not in KERNELS_MAY_IMPORT:
                found.append(f"kernels stands by itself: {name}")
            continue
        if not relative:
            found.append(f"not relative: {name}")
        target = parts[1] if len(parts) > 1 and parts[1] in LEVELS else "vsurge"
        if LEVELS[target] > LEVELS[room]:
            found.append(f"against the arrows: {name}")
    private = (ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "_src")
    return found + [f"private: {expression}" for expression in private if expression == "jax._src"]


@pytest.mark.parametrize("room", LEVELS)
def test_imports_are_relative_public_and_point_one_way(room: str) -> None:
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in sources(room)
        if (wrong := violations(room, path, path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize("room", [room for room in LEVELS if room != "benchmarks"])
def test_every_room_has_files_to_check(room: str) -> None:
    assert len(list(sources(room))) >= 5


@pytest.mark.parametrize(
    ("room", "code", "complaint"),
    [
        ("kernels", "from ..model import Qwen3Config", "against the arrows: vsurge.model.Qwen3Config"),
        ("model", "def f():\n    from .. import runtime", "against the arrows: vsurge.runtime"),
        ("runtime", "from .. import demo_model_path", "against the arrows: vsurge.demo_model_path"),
        ("runtime", "from vsurge.model import Model", "not relative: vsurge.model.Model"),
        ("benchmarks", "from ..cli import plan", "against the arrows: vsurge.cli.plan"),
        ("model", "from jax._src import core", "private: jax._src.core"),
        ("runtime", "import jax\njax._src.core.x", "private: jax._src"),
        ("kernels", "import transformers", "kernels stands by itself: transformers"),
    ],
)
def test_the_check_itself_sees_what_it_should(room: str, code: str, complaint: str) -> None:
    assert violations(room, ROOT / room / "some_file.py", code) == [complaint]
