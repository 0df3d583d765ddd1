# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""A model on a slice, in shapes alone: what lies where, and what of it a device holds and reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import jax
import numpy as np

from ..kernels.tuning.compiler import topology_devices
from ..model import (
    GenerationDefaults,
    Layout,
    Model,
    Params,
    PartitionAxis,
    Quantization,
    QuantizedMatrix,
    Qwen3Config,
    layout_of,
    make_mesh,
)
from ..model.quantized_specs import check_split, quantized_specs
from ..runtime.cache_size import page_bytes, row_state_bytes
from .slices import Slice

# A product with one of these weights reads what it is made of, and nothing else of its size
# (docs/quantization.md): any other is written to memory in float32 first, and read again.
READ_AS_STORED = ("a8bit", "fp8")
EXPANDED_BYTES = 8  # per weight: written and read


@dataclass(frozen=True)
class Deployment:
    """A model on the first devices of a slice. Build it with `deploy`.

    Attributes:
        slice: where.
        model: whose parameters are `jax.ShapeDtypeStruct`s, and whose mesh is of devices that are not there.
        quantization: of the weights.
    """

    slice: Slice
    model: Model
    quantization: Quantization | None

    @property
    def config(self) -> Qwen3Config:
        return self.model.config

    @property
    def layout(self) -> Layout:
        return self.model.layout

    @property
    def tp(self) -> int:
        """Devices that share the model."""
        return self.model.mesh.size

    @property
    def replicas(self) -> int:
        """Engines that the slice has room for, each on devices of its own."""
        return self.slice.num_devices // self.tp

    def of_layers(self, num_layers: int) -> Deployment:
        """The same of the first layers only."""
        config = replace(self.config, num_layers=num_layers)
        return replace(self, model=_model(config, self.model.mesh, self.quantization))

    def weight_bytes(self) -> int:
        """Of a device."""
        leaves: list[jax.ShapeDtypeStruct] = jax.tree.leaves(self.model.params)
        return sum(_local_size(leaf) * leaf.dtype.itemsize for leaf in leaves)

    def page_bytes(self, page_size: int) -> int:
        """Of a page in all layers, of a device."""
        return page_bytes(self.model, page_size)

    def row_state_bytes(self, num_rows: int) -> int:
        """What a device remembers of the rows of the batch."""
        return row_state_bytes(self.model, num_rows)

    def products(self) -> list[Product]:
        """The matrix products of a step, on a device."""
        params, config = self.model.params, self.config
        found = list[Product]()
        for layer in params.layers:
            for name in (
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "router",
                "gate_proj",
                "up_proj",
                "down_proj",
            ):
                weight: Any = getattr(layer, name)
                if weight is not None:
                    found.append(_product(weight, config))
        head: Any = params.embedding if params.lm_head is None else params.lm_head
        return [*found, replace(_product(head, config), is_head=True)]


@dataclass(frozen=True)
class Product:
    """A matrix product, of a device.

    Attributes:
        num_weights: numbers in the matrix, or in those of all experts that the device holds.
        num_bytes: that are read for them.
        experts: of the layer, and how many a token takes; None for a matrix that all tokens take.
        is_head: whether it is the output matrix, which takes only rows whose logits are wanted.
    """

    num_weights: int
    num_bytes: int
    experts: tuple[int, int] | None = None
    is_head: bool = False

    def flops(self, num_rows: int) -> float:
        """Operations for so many tokens, which take their experts evenly."""
        share = 1.0 if self.experts is None else self.experts[1] / self.experts[0]
        return 2.0 * num_rows * self.num_weights * share

    def read_bytes(self, num_rows: int) -> float:
        """Bytes of weights that so many tokens need, on average where each takes experts at random."""
        if self.experts is None:
            return float(self.num_bytes)
        number, taken = self.experts
        return self.num_bytes * (1 - (1 - taken / number) ** num_rows)


def _product(weight: Any, config: Qwen3Config) -> Product:
    parts: list[jax.ShapeDtypeStruct] = jax.tree.leaves(weight)
    num_bytes = sum(_local_size(part) * part.dtype.itemsize for part in parts)
    numbers = _local_size(parts[0])
    if isinstance(weight, QuantizedMatrix):
        numbers *= math.prod(weight.shape) // math.prod(parts[0].shape)  # codes of nf4 share bytes
        if weight.method not in READ_AS_STORED:
            num_bytes += numbers * EXPANDED_BYTES
    experts = None
    if len(parts[0].shape) == 3 and config.experts is not None:
        experts = config.experts.num_experts, config.experts.experts_per_token
    return Product(numbers, num_bytes, experts)


def _local_size(array: jax.ShapeDtypeStruct) -> int:
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape))


def deploy(config: Qwen3Config, quantization: Quantization | None, slice_: Slice, tp: int) -> Deployment:
    """A model on the first `tp` devices of a slice, by the kernels for TPU.

    Experts are split over tp whole: with the inner dimension of each split instead, XLA's kernel for
    `jax.lax.ragged_dot` copies the weights at every step.

    Raises:
        ValueError: there are not that many devices, a number of them is left over, or the model cannot be
            split so.
        RuntimeError: libtpu is not installed.
    """
    if tp < 1 or slice_.num_devices % tp:
        raise ValueError(f"--tp {tp}: must divide the {slice_.num_devices} devices of {slice_.name}")
    mesh = make_mesh((1, 1, 1, tp, 1), devices=devices_of(slice_))
    config = replace(config, attention="mosaic_tpu", decode_attention="mosaic_tpu")
    return Deployment(slice_, _model(config, mesh, quantization), quantization)


def _model(config: Qwen3Config, mesh: Any, quantization: Quantization | None) -> Model:
    axes = PartitionAxis()
    if config.experts is not None:
        axes = replace(axes, expert_axis=axes.mlp_intermediate_axis, mlp_intermediate_axis=None)
    layout = layout_of(config, mesh, axes)
    specs = _specs(config, quantization)
    check_split(specs, layout)

    @cache  # layers are alike
    def placed(shape: tuple[int, ...], axes: tuple[str, ...], dtype: np.dtype[Any]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(*axes))

    params: Params = jax.tree.map(
        lambda spec: placed(spec.shape, spec.axes, spec.dtype or config.dtype), specs
    )
    return Model(config, params, mesh, axes, GenerationDefaults(), None)


@lru_cache(maxsize=4)
def _specs(config: Qwen3Config, quantization: Quantization | None) -> Params:
    return quantized_specs(config, quantization)


def devices_of(slice_: Slice) -> tuple[Any, ...]:
    """The devices of a slice, none of which need be there.

    Raises:
        RuntimeError: libtpu is not installed.
    """
    return topology_devices(slice_.name, (1, 1, 1) if slice_.num_chips == 1 else None)
