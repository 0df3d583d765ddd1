"""Programs kept in a folder are found there by the next engine, and the rest of the process is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from vsurge.model import Model, Qwen3Config, random_model
from vsurge.runtime import SamplingParams, vSurge
from vsurge.runtime.blueprint import MAX_PROGRAMS

from .scripted import TIMEOUT_S

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(scope="module")
def tiny() -> Model:
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, num_q_heads=2, num_kv_heads=1,
        head_dim=16,
    )  # fmt: skip
    return random_model(config, seed=0)


def build(model: Model, folder: Any) -> vSurge:
    return vSurge.from_model(
        model, max_concurrent_decodes=2, prefill_lengths=[4, 8], max_length=32, page_size=4, num_pages=16,
        compilation_cache_dir=folder, verbose=False,
    )  # fmt: skip


@contextmanager
def counted() -> Generator[Counter[str], None, None]:
    """Hits and misses of jax's persistent cache."""
    counts: Counter[str] = Counter()

    def listen(event: str, **_: Any) -> None:
        counts[event.rsplit("/", 1)[-1]] += "compilation_cache" in event

    jax.monitoring.register_event_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(listen)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-atime")}


def test_the_next_engine_reads_every_program_from_the_folder(tiny: Model, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    before = [getattr(jax.config, name) for name in SETTINGS]
    first, second = build(tiny, folder), build(tiny, str(folder))
    with counted() as counts:
        num_programs = first.compile()
    assert num_programs == 4  # one for decoding, two for prompts, and one that writes a row
    assert (counts["cache_hits"], counts["cache_misses"]) == (0, num_programs)
    kept = files(folder)
    assert len(kept) == num_programs
    with counted() as counts:
        assert second.compile() == num_programs
    assert (counts["cache_hits"], counts["cache_misses"]) == (num_programs, 0)
    assert files(folder) == kept
    assert [getattr(jax.config, name) for name in SETTINGS] == before
    with counted() as counts:  # jax would go on with the folder that it has opened
        build(tiny, tmp_path / "another").compile()
    assert (counts["cache_hits"], counts["cache_misses"]) == (0, num_programs)
    assert len(files(tmp_path / "another")) == num_programs
    params = SamplingParams(temperature=0.0, max_tokens=8)
    with first, second:
        one, two = (surge.generate([1, 2, 3], params).result(TIMEOUT_S) for surge in (first, second))
    assert one[0].token_ids == two[0].token_ids
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(5))  # what others compile afterwards goes elsewhere
    assert files(folder) == kept


def test_settings_come_back_after_a_compilation_that_fails(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surge, before = build(tiny, tmp_path), [getattr(jax.config, name) for name in SETTINGS]

    def fail(*_: Any) -> Any:
        assert [getattr(jax.config, name) for name in SETTINGS] == [
            str(tmp_path),
            True,
            0.0,
        ]  # small ones too
        raise ZeroDivisionError

    monkeypatch.setattr(surge._executor, "_compile_lowered", fail)
    with pytest.raises(ZeroDivisionError):
        surge.compile()
    assert [getattr(jax.config, name) for name in SETTINGS] == before


def test_a_folder_that_cannot_be_made_is_an_error(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        build(tiny, tmp_path / "file" / "folder").compile()


@pytest.mark.parametrize(("folder", "error"), [(3, TypeError), ("", ValueError)])
def test_what_is_no_folder_is_refused(tiny: Model, folder: Any, error: type[Exception]) -> None:
    with pytest.raises(
        error, match=f"compilation_cache_dir={folder!r}: must be the path of a folder, or None"
    ):
        build(tiny, folder)


def test_without_lengths_of_ones_own_there_are_at_most_sixteen_programs(tiny: Model) -> None:
    for rows, length in ((1, 2), (256, 32768), (4096, 100)):
        surge = vSurge.from_model(tiny, max_concurrent_decodes=rows, max_length=length, num_pages=1)
        executor = surge._executor
        assert len(executor.decode_buckets) + len(executor.mixed_buckets) <= MAX_PROGRAMS
