"""Meshes of one device, and clear words where more are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vsurge.kernels import empty_kv_pages
from vsurge.model import Experts, PartitionAxis, Qwen3Config, make_mesh, random_model
from vsurge.model.params import param_specs
from vsurge.model.sharding import cache_sharding, named_sharding

SMALL = Qwen3Config(40, 16, 24, 2, 4, 2, 8)
ONE = jax.devices()[:1]
FOUR = jax.devices()[:1] * 4  # stand-ins: a mesh of them is never built


@pytest.mark.parametrize("dims", [(1, 1, 1, -1, 1), (-1, 1, 1, 1, 1), (1, 1, 1, 1, 1)])
def test_one_device_makes_a_mesh_of_five_axes(dims):
    mesh = make_mesh(dims, devices=ONE)
    assert dict(mesh.shape) == {"dp": 1, "fsdp": 1, "ep": 1, "tp": 1, "sp": 1}


def test_axes_may_have_other_names():
    mesh = make_mesh(axis_names=("a", "b", "c", "d", "e"), devices=ONE)
    assert mesh.axis_names == ("a", "b", "c", "d", "e")
    assert named_sharding(
        mesh, ("q_heads", "hidden"), PartitionAxis("d", "d", "d", "d", "b", "c", "e", "a")
    ).spec == (PartitionSpec("d", "b"))
    with pytest.raises(ValueError, match=r"vocab_axis='tp'.*'a'"):
        named_sharding(mesh, ("vocab",), PartitionAxis())


@pytest.mark.parametrize(
    ("dims", "axis"),
    [
        ((1, 1, 1, -1, 1), "'tp'"),
        ((1, 2, 1, 1, 1), "'fsdp'"),
        ((2, 1, -1, 1, 1), "'dp'"),
        ((1, 1, 1, 1, 4), "'sp'"),
        ((1, 1, 2, 1, 1), "'ep'"),
    ],
)
def test_more_than_one_device_is_refused_by_axis(dims, axis):
    with pytest.raises(
        NotImplementedError, match=rf"devices along {axis}.*not supported yet.*\(1, 1, 1, 1, 1\)"
    ):
        make_mesh(dims, devices=FOUR)


def test_without_a_minus_one_a_machine_of_four_devices_lends_one():
    assert make_mesh((1, 1, 1, 1, 1), devices=FOUR).size == 1


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((1, 1, 1), "5 entries"),
        ((1, -1, 1, -1, 1), "at most one is -1"),
        ((1, 0, 1, 1, 1), "at least 1"),
        ((1, -2, 1, 1, 1), "at least 1"),
        ((1, 8, 1, 1, 1), "needs 8 devices, there are 4"),
        ((3, 1, 1, -1, 1), "4 devices are no multiple of 3"),
    ],
)
def test_dimensions_that_make_no_sense_are_refused(dims, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(dims, devices=FOUR)


@pytest.mark.parametrize("names", [("dp", "tp"), ("dp", "dp", "ep", "tp", "sp")])
def test_names_must_be_five_different_ones(names):
    with pytest.raises(ValueError, match="5 different names"):
        make_mesh(axis_names=names, devices=ONE)


def test_one_axis_cannot_split_two_dimensions_of_an_array():
    with pytest.raises(ValueError, match=r"hidden_state_axis='tp'.*\['tp', 'tp'\]"):
        named_sharding(make_mesh(devices=ONE), ("mlp", "hidden"), PartitionAxis(hidden_state_axis="tp"))


def test_weights_are_described_by_the_mapping():
    axes = PartitionAxis(mlp_intermediate_axis="sp", hidden_state_axis=None)
    model = random_model(SMALL, seed=0, partition_axis=axes)
    layer = model.params.layers[0]
    for array, expected in (
        (layer.gate_proj, PartitionSpec("sp", None)),
        (layer.down_proj, PartitionSpec(None, "sp")),
        (layer.q_proj, PartitionSpec("tp", None)),
        (model.params.embedding, PartitionSpec("tp", None)),
    ):
        assert array.sharding == NamedSharding(model.mesh, expected)


def test_the_cache_is_described_by_the_same_mapping():
    mesh = make_mesh(devices=ONE)
    kv_pages = empty_kv_pages(7, 16, 3, 8, "int8")
    sizes = {"pages": 7, "keys_values": 2, "kv_heads": 3, "page_tokens": 16, "head_dim": 8}
    assert dict(zip(kv_pages.axes["data"], kv_pages.data.shape, strict=True)) == sizes
    assert kv_pages.axes["scales"] == kv_pages.axes["data"][:-1]
    assert kv_pages.scales is not None
    assert [sizes[axis] for axis in kv_pages.axes["scales"]] == list(kv_pages.scales.shape)
    assert empty_kv_pages(7, 16, 3, 8, "bfloat16").axes.keys() == {"data"}
    for axis in ("tp", "sp", None):
        axes = PartitionAxis(key_value_head_axis=axis)
        placed = jax.device_put(kv_pages, cache_sharding(mesh, kv_pages, axes))
        assert placed.data.sharding == NamedSharding(mesh, PartitionSpec(None, None, axis, None, None))
        assert placed.scales is not None
        assert placed.scales.sharding == NamedSharding(mesh, PartitionSpec(None, None, axis, None))
        weights = named_sharding(mesh, ("kv_heads", "hidden"), axes)
        assert weights.spec[0] == placed.data.sharding.spec[2]
    with pytest.raises(ValueError, match=r"key_value_head_axis='tensor'.*'tp'"):
        cache_sharding(mesh, kv_pages, PartitionAxis(key_value_head_axis="tensor"))


def test_every_axis_of_weights_and_cache_is_in_the_mapping():
    dense = param_specs(replace(SMALL, attention_bias=True))
    specs = jax.tree.leaves((dense, param_specs(replace(SMALL, experts=Experts(4, 2, 8)))))
    cache = empty_kv_pages(1, 16, 1, 8, "float32").axes
    named = {axis for spec in specs for axis in spec.axes} | {
        axis for axes in cache.values() for axis in axes
    }
    assert named | {"tokens"} == PartitionAxis().mesh_axes().keys()


def test_four_real_devices_are_counted_by_minus_one():
    script = (
        "import jax; from vsurge.model import make_mesh\n"
        "assert len(jax.devices()) == 4 and make_mesh().size == 1\n"
        "make_mesh((1, 1, 1, -1, 1))"
    )
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert "NotImplementedError: sharding_axis_dims=(1, 1, 1, 4, 1): 4 devices along 'tp'" in done.stderr
