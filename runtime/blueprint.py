"""What an engine's programs are: which function is compiled, of which shapes, and what lies where.

All of it follows from shapes alone. No device is touched before something is compiled or allocated, so a step
can also be traced for devices that are not there (`jax.experimental.topologies`).
"""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Sharding

from ..kernels import KVPages, empty_kv_pages
from ..model import Layout, Params, Qwen3Config
from .options import EngineOptions
from .rows import Rows
from .scheduler import StepKind, StepPlan
from .shaping import RowState, empty_row_state, mask_words, with_row
from .step import step
from .step_inputs import StepInputs, step_inputs

MAX_PROGRAMS = 16  # and those of `prefill_lengths`, if there are more
SMALLEST_MIXED = 16  # tokens


def default_buckets(smallest: int, largest: int, limit: int) -> tuple[int, ...]:
    """Sizes from smallest to largest, doubling, or by a larger factor where that would make too many."""
    sizes: list[int] = []
    for ratio in (2, 4, 8, 16):
        sizes = [largest]
        while sizes[-1] > smallest:
            sizes.append(max(smallest, -(-sizes[-1] // ratio)))
        if len(sizes) <= limit:
            break
    return tuple(sorted(sizes))


class Blueprint:
    """The programs of one engine.

    Weights, cache and what is remembered of the rows lie where the layout puts them; what else goes in and
    out of a program is the same on every device.

    Args:
        config: the model's shape.
        options: the engine's.
        layout: of the model.

    Attributes:
        decode_buckets: sequences of the decode steps that are compiled.
        mixed_buckets: tokens of the mixed steps that are compiled.
        layer: shapes of one layer's cache.
        layer_sharding: where they lie.
        empty_layer, empty_row_state: jitted, make an empty cache of a layer and an empty `RowState`.
    """

    def __init__(self, config: Qwen3Config, options: EngineOptions, layout: Layout) -> None:
        self._config, self._options, self._layout = config, options, layout
        rows, most = options.max_concurrent_decodes, options.max_batched_tokens
        self.decode_buckets = default_buckets(min(2, rows), rows, MAX_PROGRAMS // 2)
        if options.prefill_lengths is None:
            limit = MAX_PROGRAMS - len(self.decode_buckets)
            sizes = default_buckets(min(SMALLEST_MIXED, most), most, limit)
        else:
            sizes = tuple(sorted({*options.prefill_lengths, most}))
        parts = layout.size("tokens")
        self.mixed_buckets = tuple(sorted({-(-size // parts) * parts for size in sizes}))
        empty_layer = partial(
            empty_kv_pages,
            options.num_pages,
            options.page_size,
            config.num_kv_heads,
            config.head_dim,
            config.cache_dtype,
            platform=layout.mesh.devices.flat[0].platform,
        )
        self.layer: KVPages = jax.eval_shape(empty_layer)
        self.layer_sharding = layout.cache_sharding(self.layer)
        self.empty_layer: Callable[[], KVPages] = jax.jit(empty_layer, out_shardings=self.layer_sharding)
        by_token: Any = layout.sharding("rows", "vocab")
        no_token: Any = layout.sharding("rows")
        self._row_state_sharding = RowState(last_tokens=no_token, bias=by_token, counts=by_token)
        self.empty_row_state: Callable[[], RowState] = jax.jit(
            partial(empty_row_state, rows, config.vocab_size), out_shardings=self._row_state_sharding
        )
        self.everywhere = layout.sharding()

    def trace(self, params: Params, kind: StepKind, size: int) -> jax.stages.Traced:
        """A step of a bucket's size, to be lowered and compiled.

        Args:
            params: the weights, or their shapes with their shardings.
            kind: of the step.
            size: sequences of a decode step, tokens of a mixed one.
        """
        num_layers = self._config.num_layers
        cache = (self.layer_sharding,) * num_layers
        jitted = jax.jit(
            partial(
                step, config=self._config, decode_steps=self._options.decode_steps, layout=self._layout
            ),
            in_shardings=(
                _shardings(params), cache, self._row_state_sharding, self.everywhere, self.everywhere,
            ),
            out_shardings=(self.everywhere, cache, self._row_state_sharding),
            donate_argnums=(1, 2),
        )  # fmt: skip
        inputs = jax.eval_shape(partial(self.inputs, StepPlan(kind, ()), size, self.rows()))
        return jitted.trace(
            params,
            (self.layer,) * num_layers,
            jax.eval_shape(self.empty_row_state),
            jax.eval_shape(self.masks_without_any),
            inputs,
        )

    def trace_set_row(self) -> jax.stages.Traced:
        """The program that writes what the device remembers of one row."""
        vocab_size = self._config.vocab_size
        by_token = self._layout.sharding("vocab")
        jitted = jax.jit(
            partial(with_row),
            in_shardings=(self._row_state_sharding, self.everywhere, by_token, by_token),
            out_shardings=self._row_state_sharding,
            donate_argnums=0,
        )
        return jitted.trace(
            jax.eval_shape(self.empty_row_state),
            jax.ShapeDtypeStruct((), np.int32),
            jax.ShapeDtypeStruct((vocab_size,), np.float32),
            jax.ShapeDtypeStruct((vocab_size,), np.int32),
        )

    def rows(self) -> Rows:
        """What the host remembers of the rows of the batch, none of which is taken."""
        return Rows(self._options.max_concurrent_decodes, self._options.pages_per_seq)

    def bucket_of(self, plan: StepPlan) -> int:
        """The size of the program that runs a plan."""
        if plan.kind == "decode":
            size, buckets = len(plan.chunks), self.decode_buckets
        else:
            size, buckets = sum(chunk.length for chunk in plan.chunks), self.mixed_buckets
        return next(bucket for bucket in buckets if bucket >= size)

    def inputs(self, plan: StepPlan, bucket: int, rows: Rows) -> StepInputs:
        """What the host sends for a plan."""
        # In a mixed step no sequence has less than a token.
        max_seqs = min(self._options.max_concurrent_decodes, bucket)
        return step_inputs(plan, bucket, rows, max_seqs=max_seqs)

    def masks_without_any(self) -> npt.NDArray[np.uint32]:
        """[rows, words], masks that allow every token."""
        words = mask_words(self._config.vocab_size)
        return np.full((self._options.max_concurrent_decodes, words), 0xFFFFFFFF, np.uint32)


def _shardings(params: Params) -> Params:
    def sharding(weight: Any) -> Sharding:  # an array or a jax.ShapeDtypeStruct
        return weight.sharding

    return jax.tree.map(sharding, params)
