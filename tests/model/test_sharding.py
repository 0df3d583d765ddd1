"""Meshes, what lies where on them, and clear words where a model cannot be split so."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vsurge.kernels import empty_kv_pages
from vsurge.model import Experts, PartitionAxis, Qwen3Config, layout_of, make_mesh, random_model
from vsurge.model.params import param_specs
from vsurge.model.quantized_specs import Quantization, check_split, quantized_specs

SMALL = Qwen3Config(40, 16, 24, 2, 4, 2, 8)
ONE = jax.devices()[:1]


@dataclass(frozen=True)
class FakeDevice:
    """As much of a device as a mesh looks at."""

    id: int
    process_index: int = 0
    platform: str = "fake"


FOUR = jax.devices()[:1] * 4  # stand-ins: a mesh of them is never built


@pytest.mark.parametrize("dims", [(1, 1, 1, -1, 1), (-1, 1, 1, 1, 1), (1, 1, 1, 1, 1)])
def test_one_device_makes_a_mesh_of_five_axes(dims):
    mesh = make_mesh(dims, devices=ONE)
    assert dict(mesh.shape) == {"dp": 1, "fsdp": 1, "ep": 1, "tp": 1, "sp": 1}


def test_axes_may_have_other_names():
    mesh = make_mesh(axis_names=("a", "b", "c", "d", "e"), devices=ONE)
    assert mesh.axis_names == ("a", "b", "c", "d", "e")
    named = PartitionAxis("d", "d", "d", "d", "b", "c", "e", "a")
    assert layout_of(SMALL, mesh, named).spec("q_heads", "hidden") == PartitionSpec("d", "b")
    with pytest.raises(ValueError, match=r"vocab_axis='tp'.*'a'"):
        layout_of(SMALL, mesh, PartitionAxis())


@pytest.mark.parametrize(
    ("dims", "shape", "parts"),
    [
        ((1, 1, 1, 2, 1), {"tp": 2}, {"kv_heads": 2, "q_heads": 2, "vocab": 2, "mlp": 2, "hidden": 1}),
        ((1, 2, 1, 2, 2), {"fsdp": 2, "tp": 2, "sp": 2}, {"hidden": 2, "kv_heads": 2, "tokens": 2}),
        ((1, 1, 1, 4, 1), {"tp": 2, "tp_copies": 2}, {"kv_heads": 2, "q_heads": 4, "vocab": 4, "mlp": 4}),
        ((2, 1, 2, 1, 1), {"dp": 2, "ep": 2}, {"pages": 2, "rows": 2, "experts": 2, "kv_heads": 1}),
    ],
)
def test_a_layout_says_in_how_many_parts_everything_is_split(dims, shape, parts):
    devices = [FakeDevice(i) for i in range(math.prod(dims))]
    layout = layout_of(SMALL, make_mesh(dims, devices=devices), PartitionAxis())
    assert {name: size for name, size in layout.mesh.shape.items() if size > 1} == shape
    assert {axis: layout.size(axis) for axis in parts} == parts
    assert list(layout.mesh.devices.flat) == devices  # a copy of a KV head lies next to the head


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({"vocab_size": 41}, 2, r"vocab_size=41: cannot be split evenly over 2 devices \(vocab_axis='tp'\)"),
        ({"intermediate_size": 25}, 2, "intermediate_size=25: .* over 2 devices"),
        ({"num_q_heads": 6, "num_kv_heads": 3}, 4, "num_q_heads=6: .* over 4 devices"),
        (
            {"num_q_heads": 12, "num_kv_heads": 3, "intermediate_size": 24}, 4,
            "num_kv_heads=3: must be a multiple of the 4 devices along key_value_head_axis='tp', or divide",
        ),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_split_evenly_is_refused_with_both_numbers(changes, tp, message):
    mesh = make_mesh((1, 1, 1, tp, 1), devices=[FakeDevice(i) for i in range(tp)])
    with pytest.raises(ValueError, match=message):
        layout_of(replace(SMALL, **changes), mesh, PartitionAxis())


def test_blocks_of_weights_that_devices_cannot_share_evenly_are_refused():
    config = Qwen3Config(512, 256, 512, 1, 8, 8, 64)
    mesh = make_mesh((1, 1, 1, 8, 1), devices=[FakeDevice(i) for i in range(8)])
    layout = layout_of(config, mesh, PartitionAxis())
    check_split(param_specs(config), layout)
    message = r"q_proj.weight_scale_inv \(4, 2\): 4 cannot be split evenly over the 8 devices of \('tp',\)"
    with pytest.raises(ValueError, match=message):
        check_split(quantized_specs(config, Quantization("fp8")), layout)


def test_query_heads_and_their_kv_heads_must_be_split_alike():
    mesh = make_mesh((1, 1, 1, 2, 1), devices=[FakeDevice(i) for i in range(2)])
    with pytest.raises(ValueError, match=r"key_value_head_axis=None, head_axis='tp': must be the same axis"):
        layout_of(SMALL, mesh, PartitionAxis(key_value_head_axis=None))


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


@pytest.mark.parametrize("dims", [None, 1, "11111", ("1",) * 5, (1, 1, 1, 1.0, 1), (1, 1, 1, True, 1)])
def test_dimensions_are_integers(dims, no_type_checker):
    with pytest.raises(
        TypeError, match=f"^{re.escape(f'sharding_axis_dims={dims!r}')}: must be a sequence of"
    ):
        make_mesh(dims, devices=ONE)
    numpys: Any = (np.int64(1),) * 5
    assert make_mesh(numpys, devices=ONE).size == 1


@pytest.mark.parametrize("names", [None, "abcde", (1, 2, 3, 4, 5)])
def test_names_are_strings(names, no_type_checker):
    with pytest.raises(
        TypeError, match=f"^{re.escape(f'axis_names={names!r}')}: must be a sequence of strings"
    ):
        make_mesh(axis_names=names, devices=ONE)


@pytest.mark.parametrize("names", [("dp", "tp"), ("dp", "dp", "ep", "tp", "sp")])
def test_names_must_be_five_different_ones(names):
    with pytest.raises(ValueError, match="5 different names"):
        make_mesh(axis_names=names, devices=ONE)


def test_one_axis_cannot_split_two_dimensions_of_an_array():
    layout = layout_of(SMALL, make_mesh(devices=ONE), PartitionAxis(hidden_state_axis="tp"))
    with pytest.raises(ValueError, match=r"hidden_state_axis='tp'.*\['tp', 'tp'\]"):
        layout.spec("mlp", "hidden")


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
        layout = layout_of(SMALL, mesh, axes)
        placed = jax.device_put(kv_pages, layout.cache_sharding(kv_pages))
        assert placed.data.sharding == NamedSharding(mesh, PartitionSpec("dp", None, axis, None, None))
        assert placed.scales is not None
        assert placed.scales.sharding == NamedSharding(mesh, PartitionSpec("dp", None, axis, None))
        assert layout.spec("kv_heads", "hidden")[0] == placed.data.sharding.spec[2]
    with pytest.raises(ValueError, match=r"key_value_head_axis='tensor'.*'tp'"):
        layout_of(SMALL, mesh, PartitionAxis(key_value_head_axis="tensor"))


def test_every_axis_of_weights_and_cache_is_in_the_mapping():
    dense = param_specs(replace(SMALL, attention_bias=True))
    specs = jax.tree.leaves((dense, param_specs(replace(SMALL, experts=Experts(4, 2, 8)))))
    cache = empty_kv_pages(1, 16, 1, 8, "float32").axes
    named = {axis for spec in specs for axis in spec.axes} | {
        axis for axes in cache.values() for axis in axes
    }
    activations = {"tokens", "rows"}
    assert named | activations == PartitionAxis().mesh_axes().keys()


def test_four_real_devices_are_counted_by_minus_one():
    script = (
        "import jax; from vsurge.model import make_mesh\n"
        "assert len(jax.devices()) == 4 and make_mesh().size == 1\n"
        "print(make_mesh((1, 1, 1, -1, 1)).shape['tp'])"
    )
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "4\n", done.stderr
