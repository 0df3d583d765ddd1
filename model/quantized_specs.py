"""Which tensors of a model are quantized, and the tensors that they become.

The projections of attention and MLP are: in a decode step they are what has to be read. The embedding is
read a row per token, so that fewer bits would save memory but no time; the output matrix, whose errors go
straight into the logits, keeps the parameters' dtype as in the published FP8 checkpoints; a tied embedding is
both. Norms and biases are small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from .config import ConfigError, Qwen3Config
from .params import Params, TensorSpec, param_specs
from .quantization import DATA_DTYPE, FLOAT32, Method, QuantizedMatrix, check_shape, part_shapes
from .sharding import Layout

SCALES = {"a8bit": "_scale", "nf4": "_scale", "fp8": "_scale_inv"}  # what is added to the tensor's name


@dataclass(frozen=True)
class Quantization:
    """How a model's weights are quantized.

    Attributes:
        method: in which form.
        skipped: modules that are not, by a name's parts: "model.layers.0.mlp" is all of that layer's MLP,
            "q_proj" every layer's.
    """

    method: Method
    skipped: tuple[str, ...] = ()

    def applies_to(self, spec: TensorSpec) -> bool:
        """Whether this tensor of a model is quantized."""
        module = spec.name.removesuffix(".weight")
        if len(spec.shape) < 2 or not module.endswith("_proj"):
            return False
        return not any(f".{name}." in f".{module}." for name in self.skipped)


def quantized_specs(config: Qwen3Config, quantization: Quantization | None) -> Params:
    """`param_specs`, with a `QuantizedMatrix` of two `TensorSpec`s in the place of each quantized one.

    Raises:
        ConfigError: a matrix that cannot be quantized so.
    """
    specs = param_specs(config)
    if quantization is None:
        return specs
    return jax.tree.map(
        lambda spec: parts_of(spec, quantization.method) if quantization.applies_to(spec) else spec, specs
    )


def check_split(specs: Params, layout: Layout) -> None:
    """Checks that a layout can split every tensor evenly; of blocks there are fewer than of weights.

    Raises:
        ValueError: it cannot, with the tensor's name.
    """
    for spec in jax.tree.leaves(specs):
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            if size % layout.size(axis):
                raise ValueError(
                    f"{spec.name} {spec.shape}: {size} cannot be split evenly over the {layout.size(axis)} "
                    f"devices of {layout.mesh_axes(axis)}"
                )


def parts_of(spec: TensorSpec, method: Method) -> QuantizedMatrix:
    """The data and the scales of a quantized matrix: what they are called, and their logical axes.

    Raises:
        ConfigError: it cannot be quantized so.
    """
    if spec.parts is not None:
        return _stacked(spec, spec.parts, method)
    try:
        check_shape(spec.shape, method, f"{spec.name} {spec.shape}")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    data, scales = part_shapes(spec.shape, method)
    axes = (*spec.axes[:-2], spec.axes[-1], spec.axes[-2]) if method == "nf4" else spec.axes
    name = spec.name + SCALES[method]
    stored: Any = replace(spec, shape=data, axes=axes, dtype=DATA_DTYPE[method])
    factors: Any = replace(spec, name=name, shape=scales, axes=axes[: len(scales)], dtype=FLOAT32)
    return QuantizedMatrix(stored, factors, method)


def _stacked(spec: TensorSpec, names: tuple[str, ...], method: Method) -> QuantizedMatrix:
    """`parts_of` of a stack of transposed matrices: what each of them has, transposed and stacked."""
    one: Any = parts_of(replace(spec, shape=spec.stored_shape, axes=spec.axes[:0:-1], parts=None), method)

    def stack(part: TensorSpec) -> Any:
        suffix = part.name.removeprefix(spec.name)
        return replace(
            part,
            shape=(spec.shape[0], *part.shape[::-1]),
            axes=(spec.axes[0], *part.axes[::-1]),
            parts=tuple(name + suffix for name in names),
        )

    return QuantizedMatrix(stack(one.data), stack(one.scales), method)


def weight_bytes(config: Qwen3Config, dtype: np.dtype[Any], quantization: Quantization | None = None) -> int:
    """Bytes of all parameters, scales included.

    Args:
        config: the model's shape.
        dtype: of what is not quantized.
        quantization: of the rest.

    Raises:
        ConfigError: see `quantized_specs`.
    """
    specs = jax.tree.leaves(quantized_specs(config, quantization))
    return sum(spec.size * (spec.dtype or dtype).itemsize for spec in specs)
