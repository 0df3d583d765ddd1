"""The cache lies where the mapping from logical axes to axes of the mesh puts it, and stays there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vsurge.model import Model, PartitionAxis
from vsurge.runtime import SamplingParams, vSurge
from vsurge.runtime.executor import Executor
from vsurge.runtime.step_plan import StepPlan

from ..devices import TP
from .scripted import TIMEOUT_S

OVER_HEADS = PartitionSpec("dp", None, "tp", None, None)  # pages, keys and values, KV heads, tokens, head_dim


@pytest.fixture
def executor(surge: vSurge) -> Executor:
    """One of its own, with an empty cache and the running engine's programs: they are of the same shapes."""
    executor = Executor(surge.model, surge._executor._options)
    executor._programs = surge._executor._programs
    executor.allocate()
    return executor


def test_the_cache_lies_on_the_models_mesh_by_the_models_mapping(surge: vSurge) -> None:
    surge.generate([1, 2, 3], SamplingParams(max_tokens=3)).result(TIMEOUT_S)
    assert len(surge._executor._kv_pages) == surge.model.config.num_layers
    for layer in surge._executor._kv_pages:
        assert layer.data.sharding == NamedSharding(surge.model.mesh, OVER_HEADS)


@pytest.mark.skipif(TP > 1, reason="query heads and KV heads that are split must lie on one axis")
def test_another_mapping_places_the_cache_elsewhere(model: Model) -> None:
    other = replace(model, partition_axis=PartitionAxis(key_value_head_axis="sp"))
    executor = vSurge.from_model(other, num_pages=2, verbose=False)._executor
    executor.allocate()
    expected = NamedSharding(model.mesh, PartitionSpec("dp", None, "sp", None, None))
    assert [layer.data.sharding for layer in executor._kv_pages] == [expected] * model.config.num_layers


def test_every_program_takes_and_gives_the_cache_where_it_lies_and_in_place(surge: vSurge) -> None:
    executor = surge._executor
    cache = [NamedSharding(surge.model.mesh, OVER_HEADS)] * surge.model.config.num_layers
    cache_bytes = sum(layer.data.addressable_shards[0].data.nbytes for layer in executor._kv_pages)
    assert len(executor._programs) == len(executor.decode_buckets) + len(executor.mixed_buckets)
    for program in executor._programs.values():
        _, taken, *_ = program.input_shardings[0]
        _, given, _ = program.output_shardings
        assert jax.tree.leaves(taken) == jax.tree.leaves(given) == cache
        text, memory = program.as_text(), program.memory_analysis()
        assert text is not None
        assert memory is not None
        aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
        assert aliases is not None
        assert aliases.group(1).count("alias") == len(cache) + 3  # and what is remembered of the rows
        assert memory.alias_size_in_bytes >= cache_bytes


@pytest.mark.parametrize("kind", ["mixed", "decode"])
def test_a_step_leaves_the_cache_at_its_address(executor: Executor, kind: str) -> None:
    def addresses() -> list[int]:
        shards = [shard.data for layer in executor._kv_pages for shard in layer.data.addressable_shards]
        return [shard.unsafe_buffer_pointer() for shard in shards]

    before, cache = addresses(), executor._kv_pages
    executor.run(StepPlan(kind, ())).tokens.block_until_ready()  # pyright: ignore[reportArgumentType]
    assert addresses() == before
    assert all(layer.data.is_deleted() for layer in cache)
    assert executor._kv_pages[0].data.sharding == NamedSharding(executor._model.mesh, OVER_HEADS)


ON_TWO_DEVICES = """
from dataclasses import replace
import jax, numpy as np
from jax.sharding import Mesh
from vsurge.model import Qwen3Config, random_model
from vsurge.model.params import param_specs
from vsurge.model.sharding import AXIS_NAMES
from vsurge.runtime import SamplingParams, vSurge

config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, num_q_heads=4,
                     num_kv_heads=2, head_dim=16)
model = random_model(config, seed=0, dtype="float32")

def generate(*devices):
    mesh = Mesh(np.array(devices).reshape(1, 1, 1, -1, 1), AXIS_NAMES)
    placed = replace(model, mesh=mesh)
    places = jax.tree.map(lambda t: placed.layout.sharding(*t.axes), param_specs(config))
    placed = replace(placed, params=jax.device_put(model.params, places))
    surge = vSurge.from_model(placed, max_concurrent_decodes=1, prefill_lengths=[8], max_length=32,
                              page_size=4, num_pages=8, verbose=False)
    with surge:
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        [sample] = surge.generate([1, 2, 3], params).result()
        shards = surge._executor._kv_pages[0].data.addressable_shards
        print([(shard.device.id, shard.data.shape) for shard in shards])
        print(sample.token_ids)

first, second = jax.devices()
generate(second)
generate(first, second)
"""


def test_the_mapping_alone_moves_an_engine_to_another_device_or_to_two() -> None:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO_DEVICES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    on_second, its_tokens, on_both, their_tokens = done.stdout.splitlines()
    assert on_second == "[(1, (8, 2, 2, 4, 16))]"
    assert on_both == "[(0, (8, 2, 1, 4, 16)), (1, (8, 2, 1, 4, 16))]"  # a head each
    assert its_tokens == their_tokens
