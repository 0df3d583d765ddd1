"""A cache that does not fit is refused with what there is, and with a number of pages that does fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from vsurge.model import Layout, Model, PartitionAxis
from vsurge.model.sharding import AXIS_NAMES, TRIVIAL_DIMS
from vsurge.runtime import OutOfMemory, vSurge
from vsurge.runtime.cache_size import out_of_memory, page_bytes
from vsurge.runtime.host_memory import available_bytes

from ..devices import TP


class FakeDevice(SimpleNamespace):
    """As much of a device as a mesh looks at; a mesh hashes its devices."""

    def __hash__(self) -> int:
        return id(self)


PAGE_SIZE = 16
MIB = 1 << 20


@pytest.fixture
def make(model: Model) -> Callable[[int], vSurge]:
    """Engines that compile nothing."""

    def make(num_pages: int) -> vSurge:
        surge = vSurge.from_model(
            model, num_pages=num_pages, page_size=PAGE_SIZE, max_length=64, max_concurrent_decodes=2,
            verbose=False,
        )  # fmt: skip
        surge.compile = lambda: 0
        return surge

    return make


def test_the_number_of_pages_that_is_advised_fits(
    make: Callable[[int], vSurge], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsurge.runtime.cache_size.available_bytes", lambda: 64 * MIB)
    size = page_bytes(model, PAGE_SIZE) * TP  # the devices of a CPU share its memory
    with pytest.raises(OutOfMemory) as refused:
        make(64 * MIB // size + 1).start()
    found = re.search(
        r"(\d+) bytes a page .*; 0\.06 GiB are free; num_pages=(\d+) would fit$", str(refused.value)
    )
    assert found is not None
    assert int(found[1]) == size
    advised = int(found[2])
    assert 0.8 * 64 * MIB <= advised * size <= 64 * MIB
    with make(advised) as surge:
        pages = surge._executor._kv_pages
        assert sum(layer.data.nbytes for layer in pages) == advised * size  # what a page takes is true


def test_a_cpu_that_has_less_than_was_asked_for_is_not_asked(
    make: Callable[[int], vSurge], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = available_bytes()
    if free is None:
        pytest.skip("this system does not say how much memory is free")
    assert free > MIB
    surge = make(2 * free // page_bytes(model, PAGE_SIZE))  # Linux would promise it, and kill who uses it
    monkeypatch.setattr(surge._executor, "allocate", lambda: pytest.fail("was allocated"))
    with pytest.raises(OutOfMemory, match=r"GiB are free; num_pages=\d+ would fit"):
        surge.start()


def test_where_not_one_page_fits_smaller_ones_are_advised(
    make: Callable[[int], vSurge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsurge.runtime.cache_size.available_bytes", lambda: 100)
    with pytest.raises(OutOfMemory, match="not one page does: use a smaller page_size"):
        make(4).start()


def test_a_system_that_does_not_say_what_is_free_is_just_tried(
    make: Callable[[int], vSurge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vsurge.runtime.cache_size.available_bytes", lambda: None)
    with make(4):
        pass
    surge = make(4)

    def refuse() -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED: no")

    monkeypatch.setattr(surge._executor, "_empty_layer", refuse)
    with pytest.raises(OutOfMemory, match="the cpu does not say how much is free; use fewer pages"):
        surge.start()


def test_an_accelerator_tells_what_its_allocator_knows() -> None:
    stats = {"bytes_limit": 16 << 30, "bytes_in_use": 12 << 30}
    device = FakeDevice(id=0, platform="gpu", memory_stats=lambda: stats)
    mesh = Mesh(np.array([device]).reshape(TRIVIAL_DIMS), AXIS_NAMES)
    # pages of 8 MiB: layers, keys and values, heads, tokens, head_dim, bytes
    config = SimpleNamespace(num_layers=4, num_kv_heads=32, head_dim=128, cache_dtype=np.dtype(np.float32))
    model: Any = SimpleNamespace(config=config, mesh=mesh, layout=Layout(mesh, PartitionAxis()))
    assert page_bytes(model, 64) == 1 << 23
    message = (
        r"num_pages=1000: a cache of 7.81 GiB does not fit, .* 4.00 GiB are free; num_pages=460 would fit"
    )
    assert re.search(message, str(out_of_memory(model, 1000, 64)))
    in_pieces = str(out_of_memory(model, 480, 64))  # less than is free, but was refused
    assert in_pieces.endswith("num_pages=240 would fit")
