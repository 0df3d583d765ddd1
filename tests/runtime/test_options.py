"""An engine's options: what cannot work is refused at the door, by name; what is left open is decided."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from vsurge.model import Layout, Model, PartitionAxis
from vsurge.model.sharding import AXIS_NAMES, TRIVIAL_DIMS
from vsurge.runtime import OutOfMemory, SamplingParams, vSurge
from vsurge.runtime.blueprint import MAX_PROGRAMS, default_buckets
from vsurge.runtime.cache_size import CPU_CACHE_BYTES, choose_num_pages, page_bytes
from vsurge.runtime.executor import Executor

from ..devices import TP


class FakeDevice(SimpleNamespace):
    """As much of a device as a mesh looks at; a mesh hashes its devices."""

    def __hash__(self) -> int:
        return id(self)


INTEGERS = (
    "max_concurrent_decodes", "max_concurrent_prefill", "max_prefill_length", "max_batched_tokens",
    "decode_steps", "max_length", "page_size", "num_pages", "max_queued_requests", "seed",
)  # fmt: skip
MAY_BE_NONE = {
    "max_concurrent_prefill", "max_prefill_length", "max_batched_tokens", "max_length", "num_pages",
    "prefill_lengths",
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_concurrent_decodes": 0}, ValueError, "max_concurrent_decodes=0: must be at least 1"),
        ({"max_concurrent_prefill": -1}, ValueError, "max_concurrent_prefill=-1: must be at least 1"),
        ({"page_size": 0}, ValueError, "page_size=0"),
        ({"num_pages": 0}, ValueError, "num_pages=0"),
        ({"max_queued_requests": 0}, ValueError, "max_queued_requests=0"),
        ({"seed": -1}, ValueError, "seed=-1: must be at least 0"),
        ({"max_length": 0}, ValueError, r"max_length=0: must lie between 2 and the model's \d+$"),
        ({"max_length": 1}, ValueError, r"max_length=1: must lie between 2 and the model's \d+$"),
        ({"max_length": 10**6}, ValueError, r"max_length=1000000: must lie between 2 and the model's \d+$"),
        (
            {"max_prefill_length": 200, "max_length": 100}, ValueError,
            "max_prefill_length=200: .* 1 and max_length=100",
        ),
        ({"max_prefill_length": 0}, ValueError, "max_prefill_length=0: must be at least 1"),
        ({"decode_steps": 0}, ValueError, "decode_steps=0: must be at least 1"),
        ({"prefix_caching": 1}, TypeError, "prefix_caching=1: must be True or False"),
        (
            {"max_batched_tokens": 3, "max_concurrent_decodes": 4}, ValueError,
            "max_batched_tokens=3: must be at least max_concurrent_decodes=4",
        ),
        ({"prefill_lengths": []}, ValueError, "prefill_lengths: is empty"),
        ({"prefill_lengths": [8, 0]}, ValueError, r"prefill_lengths\[1\]=0: must be at least 1"),
        ({"prefill_lengths": [8, 2.5]}, TypeError, r"prefill_lengths\[1\]=2.5: must be an integer"),
        ({"prefill_lengths": 8}, TypeError, "prefill_lengths=8: must be a sequence of integers"),
        ({"prefill_lengths": "8"}, TypeError, "prefill_lengths='8': must be a sequence of integers"),
        (
            {"prefill_lengths": [8], "max_prefill_length": 9}, ValueError,
            "largest must be max_prefill_length=9",
        ),
        (
            {"prefill_lengths": [8, 200], "max_length": 100}, ValueError,
            r"^prefill_lengths=\[8, 200\]: must lie between 1 and max_length=100",
        ),
        ({"memory_utilization": 0.0}, ValueError, r"memory_utilization=0.0: must lie in \(0, 1\]"),
        ({"memory_utilization": 1.1}, ValueError, "memory_utilization=1.1"),
        ({"memory_utilization": "0.9"}, TypeError, "memory_utilization='0.9': must be a number"),
        ({"memory_utilization": True}, TypeError, "memory_utilization=True: must be a number"),
        ({"extra_eos_token_ids": [1536]}, ValueError, "extra_eos_token_ids: token id 1536 is outside"),
        ({"extra_eos_token_ids": [1, "2"]}, TypeError, r"extra_eos_token_ids\[1\]='2': must be an integer"),
        ({"extra_eos_token_ids": 5}, TypeError, "extra_eos_token_ids=5: must be a sequence"),
        ({"vsurge_name": 3}, TypeError, "vsurge_name=3: must be a string"),
        ({"verbose": 1}, TypeError, "verbose=1: must be True or False"),
        ({"processor": object()}, TypeError, "processor=object"),
        ({"processor": "Qwen/Qwen3-0.6B"}, TypeError, "processor='Qwen/Qwen3-0.6B': .*AutoTokenizer"),
        ({"processor": Path("there")}, TypeError, "processor='there': .*AutoTokenizer"),
        ({"model": "Qwen/Qwen3-0.6B"}, TypeError, r"model='Qwen/Qwen3-0.6B': .*load_model\("),
        ({"model": Path("there")}, TypeError, r"model='there': .*load_model\("),
        ({"model": 5}, TypeError, "model=5: must be a Model"),
        ({"processes": 2}, TypeError, "processes=2: must be what join_processes returned, or None"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_work_is_refused_by_name(
    model: Model, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vSurge.from_model(**{"model": model, "num_pages": 4} | options)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [2.0, True, "2", np.float32(2), np.True_])
def test_what_is_no_integer_is_refused_by_name(model: Model, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"{name}={value!r}: must be an integer")):
        vSurge.from_model(model, **{name: value})


@pytest.mark.parametrize(
    "name",
    [
        *INTEGERS,
        "prefill_lengths",
        "prefix_caching",
        "memory_utilization",
        "extra_eos_token_ids",
        "vsurge_name",
        "verbose",
    ],
)
def test_none_is_taken_only_where_it_is_documented(model: Model, name: str) -> None:
    def build() -> vSurge:
        return vSurge.from_model(model, **{"num_pages": 4, name: None})

    if name in MAY_BE_NONE:
        assert build().num_pages > 0
    else:
        with pytest.raises(TypeError, match=f"^{name}=None: must be "):
            build()


def test_numpy_numbers_are_numbers(model: Model) -> None:
    options: dict[str, Any] = {name: np.int64(32) for name in INTEGERS}
    options["prefill_lengths"] = np.array([32, 8, 32])
    options["extra_eos_token_ids"] = [np.int32(7)]
    options["memory_utilization"] = np.float32(0.5)
    surge = vSurge.from_model(model, **options)
    values = [surge.num_pages, surge.page_size, surge.max_length, *surge.eos_token_ids]
    assert [type(value) for value in values] == [int] * len(values)
    assert surge._executor.mixed_buckets == (8, 32)
    assert surge.eos_token_ids[-1] == 7


@pytest.mark.parametrize("name", ["attention", "decode_attention"])
def test_a_kernel_that_cannot_be_compiled_is_refused_by_name(model: Model, name: str) -> None:
    config = replace(model.config, **{name: "reference"})
    message = f"^{name}='reference' in the model's config: .* use {name}=None or 'xla'"
    with pytest.raises(ValueError, match=message):
        vSurge.from_model(replace(model, config=config), num_pages=4)


@given(st.integers(1, 1024), st.integers(1, 2**17))
def test_buckets_rise_to_the_largest_and_are_at_most_sixteen(rows: int, prefill_length: int) -> None:
    decode = default_buckets(min(2, rows), rows, MAX_PROGRAMS // 2)
    prefill = default_buckets(min(32, prefill_length), prefill_length, MAX_PROGRAMS - len(decode))
    assert len(decode) + len(prefill) <= MAX_PROGRAMS
    for buckets, smallest, largest in (
        (decode, min(2, rows), rows),
        (prefill, min(32, prefill_length), prefill_length),
    ):
        assert list(buckets) == sorted(set(buckets))
        assert (buckets[0], buckets[-1]) == (smallest, largest)
        assert all(b <= 16 * a for a, b in itertools.pairwise(buckets))


@pytest.mark.parametrize(
    ("rows", "prefill", "length"), [(1, None, None), (64, None, None), (256, 512, 1024), (1000, 7, 9)]
)
def test_an_engine_has_at_most_sixteen_programs_by_default(
    model: Model, rows: int, prefill: int | None, length: int | None
) -> None:
    surge = vSurge.from_model(
        model, max_concurrent_decodes=rows, max_prefill_length=prefill, max_length=length, num_pages=4
    )
    executor = surge._executor
    assert isinstance(executor, Executor)
    assert 2 <= len(executor.decode_buckets) + len(executor.mixed_buckets) <= 16
    assert executor.decode_buckets[-1] == rows


def test_the_cache_is_as_large_as_it_can_be_of_use_and_no_larger_than_its_budget(model: Model) -> None:
    size = page_bytes(model, 128)
    # layers, keys and values, heads, head_dim, bytes, tokens
    assert size == 4 * 2 * (2 // TP) * 64 * 4 * 128

    def pages(useful: int, page_size: int = 128) -> int:
        return choose_num_pages(
            model, page_size=page_size, memory_utilization=0.9, max_useful_pages=useful, num_rows=4
        )

    assert pages(12) == 12
    assert pages(10**9) == CPU_CACHE_BYTES // (size * TP)  # the devices of a CPU share its memory
    with pytest.raises(
        OutOfMemory, match=r"one page of 1000000 tokens takes .* the cache may take 1024.0 MiB"
    ):
        pages(1, page_size=1_000_000)
    surge = vSurge.from_model(model, max_concurrent_decodes=3, max_length=200)
    assert surge.num_pages == 12  # every row has room for a sequence of max_length, and for one that was
    surge = vSurge.from_model(model, max_concurrent_decodes=3, max_length=200, prefix_caching=False)
    assert surge.num_pages == 6


def test_an_accelerators_cache_is_a_share_of_what_the_weights_leave() -> None:
    gib = 1 << 30
    device = FakeDevice(
        id=0, platform="gpu", memory_stats=lambda: {"bytes_limit": 16 * gib, "bytes_in_use": 6 * gib}
    )
    for cache_dtype, row_bytes in ((np.dtype(jnp.bfloat16), 2 * 128), (np.dtype(np.int8), 128 + 4)):
        config = SimpleNamespace(
            vocab_size=1000, num_layers=2, num_kv_heads=8, head_dim=128, cache_dtype=cache_dtype
        )
        mesh = Mesh(np.array([device]).reshape(TRIVIAL_DIMS), AXIS_NAMES)
        layout = Layout(mesh, PartitionAxis())
        model: Any = SimpleNamespace(config=config, mesh=mesh, layout=layout)
        num_pages = choose_num_pages(
            model, page_size=128, memory_utilization=0.5, max_useful_pages=10**9, num_rows=16
        )
        remembered = 16 * 1000 * (4 + 4)  # a bias and a count of each token
        assert num_pages == (10 * gib - remembered) // 2 // (2 * 2 * 8 * row_bytes * 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_concurrent_decodes": 3}, "max_concurrent_decodes=3: .* multiple of the 2 .* batch_axis='dp'"),
        ({"num_pages": 5}, "num_pages=5: must be a multiple of the 2 replicas along batch_axis='dp'"),
        (
            {"max_batched_tokens": 1, "max_concurrent_decodes": 4},
            "max_batched_tokens=1: .* max_concurrent_decodes=4 over 2 replicas",
        ),
    ],
)
def test_replicas_share_rows_and_pages_evenly(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vSurge.from_model(on_two_replicas(model), **options)


def test_what_each_replica_has_bounds_a_step_and_a_sequence(model: Model) -> None:
    made = vSurge.from_model(
        on_two_replicas(model), max_concurrent_decodes=8, max_batched_tokens=4, max_prefill_length=4,
        max_length=100, page_size=16, num_pages=6,
    )  # fmt: skip
    options = made._executor._options
    assert (options.rows_per_replica, options.pages_per_replica, options.longest_sequence) == (4, 3, 49)
    assert made._executor.decode_buckets == (2, 4)
    with pytest.raises(ValueError, match=r"each of 2 replicas has its share of num_pages=6; max_tokens=9 "):
        made.generate([1] * 40, SamplingParams(max_tokens=20))


def test_replicas_need_an_axis_of_their_own(model: Model) -> None:
    axes = PartitionAxis(batch_axis="fsdp")
    mesh = Mesh(
        np.array([FakeDevice(id=i, platform="cpu") for i in range(2)]).reshape(1, 2, 1, 1, 1), AXIS_NAMES
    )
    with pytest.raises(ValueError, match="batch_axis='fsdp' is its hidden_state_axis too"):
        vSurge.from_model(replace(model, mesh=mesh, partition_axis=axes))


def on_two_replicas(model: Model) -> Model:
    """As far as an engine's options go."""
    devices = [FakeDevice(id=i, platform="cpu", process_index=0, memory_stats=dict) for i in range(2)]
    return replace(model, mesh=Mesh(np.array(devices).reshape(2, 1, 1, 1, 1), AXIS_NAMES))
