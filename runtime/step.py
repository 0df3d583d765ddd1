"""What one step is: the function that is compiled.

A step's tokens stay on the device, one per row of the batch, and are the next step's input; the host only
reads copies of them. On several devices each chooses among the tokens whose logits it has, and they agree.
Replicas run the same program, each on its own rows, pages and inputs, and know nothing of each other.
"""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from ..kernels import KVPages
from ..model import Batch, Layout, Params, Qwen3Config, forward, hidden_states, logits
from .leaf import Leaf
from .logprobs import SCORED_TOGETHER, LogprobArrays, all_logprobs, logprobs_of, no_logprobs
from .sampling import sample
from .shaping import RowState, by_axes, shape_logits, with_tokens
from .step_inputs import StepInputs
from .vocabulary import VocabularyPart


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What comes out of a step, in the order of its chunks and then padding.

    Attributes:
        tokens: [steps, n] int32, the tokens chosen; of a chunk the first `num_outputs` count. -1: none was
            allowed; -2: a logit was NaN or infinite.
        logprobs: of these tokens, [steps, n]; zeros if nobody wanted them.
        scores: of the tokens that follow `StepInputs.scored`; None in a decode step.
    """

    tokens: Leaf
    logprobs: LogprobArrays | None = None
    scores: LogprobArrays | None = None

    def wait(self) -> None:
        """Until the step has run."""
        jax.block_until_ready(self.tokens)


def step(
    params: Params,
    kv_pages: tuple[KVPages, ...],
    row_state: RowState,
    masks: UInt[Array, "all_rows words"],
    inputs: StepInputs,
    *,
    config: Qwen3Config,
    decode_steps: int,
    layout: Layout,
) -> tuple[StepOutput, tuple[KVPages, ...], RowState]:
    """One mixed step, or some decode steps: what is chosen, and cache and rows after it.

    All but the weights is that of one replica after the other, each array in equal parts along its first
    axis; in `StepOutput`, along the axis of the sequences or of the scored tokens.
    """
    replica = partial(
        _replica_step, config=config, decode_steps=decode_steps, layout=layout.without("batch_axis")
    )
    if layout.size("rows") == 1:
        return replica(params, kv_pages, row_state, masks, inputs)
    ours = PartitionSpec(layout.mesh_axes("rows"))
    mapped = jax.shard_map(
        replica,
        mesh=layout.mesh,
        in_specs=(PartitionSpec(), ours, ours, ours, ours),
        out_specs=(_output_specs(layout, inputs), ours, ours),
        axis_names=set(layout.mesh_axes("rows")),
        check_vma=False,
    )
    return cast(Any, mapped(params, kv_pages, row_state, masks, inputs))


def _output_specs(layout: Layout, inputs: StepInputs) -> StepOutput:
    """How the replicas' output is put together, a `PartitionSpec` in the place of each array."""

    def logprobs(spec: Any) -> LogprobArrays:
        return LogprobArrays(spec, spec, spec, spec)

    tokens: Any = layout.spec(None, "rows")
    scores = None if inputs.scored is None else logprobs(layout.spec("rows"))
    return StepOutput(tokens, logprobs(tokens), scores)


def _replica_step(
    params: Params,
    kv_pages: tuple[KVPages, ...],
    row_state: RowState,
    masks: UInt[Array, "num_rows words"],
    inputs: StepInputs,
    *,
    config: Qwen3Config,
    decode_steps: int,
    layout: Layout,
) -> tuple[StepOutput, tuple[KVPages, ...], RowState]:
    """`step` of one replica."""
    page_size = kv_pages[0].page_size
    if inputs.samples is not None:
        batch = _mixed_batch(inputs, row_state.last_tokens, page_size)
        assert batch.logit_rows is not None
        x, kv_pages = hidden_states(params, config, batch, kv_pages, layout=layout)
        row_logits = logits(params, config, x[batch.logit_rows], layout=layout)
        ends = jnp.asarray(inputs.kv_lens)
        tokens, logprobs, row_state = _choose(
            row_logits, inputs, ends, jnp.asarray(inputs.samples), row_state, masks, layout
        )
        scores = _scores(partial(logits, params, config, layout=layout), x, inputs, layout)
        return replace(_one_step(tokens, logprobs), scores=scores), kv_pages, row_state

    assert inputs.ends is not None
    ends = jnp.asarray(inputs.ends)

    def decode(j: Array, state: tuple[tuple[KVPages, ...], RowState]) -> Any:
        kv_pages, row_state = state
        kv_lens = jnp.minimum(inputs.kv_lens + j, ends)
        runs = (kv_lens == inputs.kv_lens + j) & (kv_lens > 0)
        batch = _decode_batch(inputs, kv_lens, runs, row_state.last_tokens, page_size)
        row_logits, kv_pages = forward(params, config, batch, kv_pages, layout=layout)
        tokens, logprobs, row_state = _choose(row_logits, inputs, kv_lens, runs, row_state, masks, layout)
        return (tokens, logprobs), kv_pages, row_state

    if decode_steps == 1:
        (tokens, logprobs), *state = decode(jnp.int32(0), (kv_pages, row_state))
        return _one_step(tokens, logprobs), *state

    def put(j: Array, state: Any) -> Any:
        outputs, *state = state
        (tokens, logprobs), *state = decode(j, tuple(state))
        return _put(outputs, StepOutput(tokens, logprobs), j), *state

    n = inputs.rows.shape[0]
    outputs = StepOutput(jnp.zeros((decode_steps, n), jnp.int32), no_logprobs(decode_steps, n))
    return cast(Any, lax.fori_loop(0, decode_steps, put, (outputs, kv_pages, row_state)))


def _one_step(tokens: Array, logprobs: LogprobArrays) -> StepOutput:
    def first(array: Array) -> Array:
        return array[None]

    return StepOutput(tokens[None], jax.tree.map(first, logprobs))


def _put(whole: Any, part: Any, start: Array, size: int | None = None) -> Any:
    """A pytree's arrays with others in the place of entry `start`, or of `size` from it."""

    def put(array: Array, values: Array) -> Array:
        values = values[None] if size is None else values
        return lax.dynamic_update_slice_in_dim(array, values, start, 0)

    return jax.tree.map(put, whole, part)


def _choose(
    row_logits: Float[Array, "n vocab"],
    inputs: StepInputs,
    positions: Int[Array, " n"],
    which: Bool[Array, " n"],
    row_state: RowState,
    masks: UInt[Array, "num_rows words"],
    layout: Layout,
) -> tuple[Int[Array, " n"], LogprobArrays, RowState]:
    """The next token of each sequence; those that count are remembered."""
    part = _part_of(layout)

    def choose(
        row_logits: Array,
        inputs: StepInputs,
        positions: Array,
        which: Array,
        row_state: RowState,
        masks: Array,
    ) -> tuple[Array, LogprobArrays, RowState]:
        rows = jnp.asarray(inputs.rows)
        shaped = shape_logits(row_logits, inputs.shaping, rows, row_state, masks, part)
        tokens = sample(shaped, inputs.sampling, positions, part)
        logprobs = logprobs_of(row_logits, tokens, jnp.asarray(inputs.wants_logprobs), part)
        return tokens, logprobs, with_tokens(row_state, rows, tokens, which, part)

    of_rows, same = by_axes(layout.spec), PartitionSpec()
    mapped = layout.shard_map(
        choose, (layout.spec(None, "vocab"), same, same, same, of_rows, same), (same, same, of_rows)
    )
    return mapped(row_logits, inputs, positions, which, row_state, masks)


def _part_of(layout: Layout) -> VocabularyPart:
    return VocabularyPart(layout.mesh_axes("vocab") if layout.size("vocab") > 1 else ())


def _scores(
    score: Any, x: Float[Array, "num_tokens hidden"], inputs: StepInputs, layout: Layout
) -> LogprobArrays:
    """Log-probabilities of given tokens behind others, as many at a time as `SCORED_TOGETHER`."""
    assert inputs.scored is not None
    assert inputs.targets is not None
    assert inputs.num_scored is not None
    scored, targets = jnp.asarray(inputs.scored), jnp.asarray(inputs.targets)
    part = _part_of(layout)
    logprobs = layout.shard_map(
        partial(all_logprobs, part=part), (layout.spec(None, "vocab"), PartitionSpec()), PartitionSpec()
    )

    def put(i: Array, scores: LogprobArrays) -> LogprobArrays:
        start = i * SCORED_TOGETHER
        which = lax.dynamic_slice_in_dim(scored, start, SCORED_TOGETHER)
        following = lax.dynamic_slice_in_dim(targets, start, SCORED_TOGETHER)
        some = logprobs(score(x[which]), following)
        return _put(scores, some, start, SCORED_TOGETHER)

    count = -(-jnp.asarray(inputs.num_scored)[0] // SCORED_TOGETHER)
    none = no_logprobs(scored.shape[0])

    def put_all() -> LogprobArrays:
        return cast(LogprobArrays, lax.fori_loop(0, count, put, none))

    # Where the loop has one trip at most, XLA finds its body invariant and takes it out of the loop: without
    # the condition, a step without such tokens would compute 64 rows of logits.
    return cast(LogprobArrays, lax.cond(count > 0, put_all, lambda: none))


def _decode_batch(
    inputs: StepInputs, kv_lens: Array, runs: Array, last_tokens: Array, page_size: int
) -> Batch:
    sequence = jnp.arange(inputs.rows.shape[0], dtype=jnp.int32)
    positions = jnp.maximum(kv_lens - 1, 0)
    slots = _slots(inputs.page_table, sequence, positions, page_size)
    return Batch(
        token_ids=last_tokens.at[inputs.rows].get(mode="clip"),
        positions=positions,
        slots=jnp.where(runs, slots, -1),
        kv_lens=kv_lens,
        page_table=inputs.page_table,
    )


def _mixed_batch(inputs: StepInputs, last_tokens: Array, page_size: int) -> Batch:
    assert inputs.token_ids is not None
    assert inputs.query_starts is not None
    assert inputs.num_found is not None
    starts = inputs.query_starts
    token = jnp.arange(inputs.token_ids.shape[0], dtype=jnp.int32)
    sequence = jnp.sum(
        (starts[None, 1:] <= token[:, None]).astype(jnp.int32), axis=1
    )  # starts of padding: the end
    used = sequence < starts.shape[0] - 1
    sequence = jnp.where(used, sequence, 0)
    positions = token - starts[sequence + 1] + inputs.kv_lens[sequence]
    positions = jnp.where(used, positions, 0)
    is_new = used & (positions >= jnp.asarray(inputs.num_found)[sequence])
    on_device = last_tokens.at[inputs.rows[sequence]].get(mode="clip")
    return Batch(
        token_ids=jnp.where(inputs.token_ids < 0, on_device, inputs.token_ids),
        positions=positions,
        slots=jnp.where(is_new, _slots(inputs.page_table, sequence, positions, page_size), -1),
        kv_lens=inputs.kv_lens,
        page_table=inputs.page_table,
        query_starts=starts,
        num_seqs=inputs.num_seqs,
        logit_rows=jnp.maximum(starts[1:] - 1, 0),
    )


def _slots(page_table: Array, sequence: Array, positions: Array, page_size: int) -> Array:
    return page_table[sequence, positions // page_size] * page_size + positions % page_size
