"""New weights between two steps: nothing of the old ones is seen afterwards, and others' arrays are safe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.model import Model
from vsurge.runtime import SamplingParams, StepFailed, vSurge
from vsurge.runtime.step_plan import StepPlan

from .greedy import STORY, one
from .scripted import LONG, TIMEOUT_S, Scripted, pool_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def others(model: Model) -> Any:
    """Weights that write another text: each layer's MLP is turned around."""
    layers = tuple(replace(layer, down_proj=-layer.down_proj) for layer in model.params.layers)
    return replace(model.params, layers=layers)


@pytest.fixture
def own(surge: vSurge) -> Iterator[vSurge]:
    """A running engine that may be given other weights; it shares `surge`'s programs."""
    made = vSurge(surge.model, surge.processor, surge._executor._options, _executor_like(surge))
    with made:
        yield made
    assert pool_of(made).num_used == 0


def _executor_like(surge: vSurge) -> Any:
    executor = type(surge._executor)(surge.model, surge._executor._options)
    executor._programs = surge._executor._programs
    return executor


def test_after_the_swap_new_requests_are_those_of_an_engine_with_the_new_weights(
    own: vSurge, surge: vSurge, others: Any
) -> None:
    prompt = own.processor.encode(STORY) * 3
    old = one(own, prompt, GREEDY)
    assert old.token_ids == one(surge, prompt, GREEDY).token_ids
    assert one(own, prompt, GREEDY).num_cached_tokens > 0
    own.update_params(others)
    new = one(own, prompt, GREEDY)
    assert new.num_cached_tokens == 0  # what is cached was made with the old ones
    assert new.token_ids != old.token_ids
    assert one(own, prompt, GREEDY).token_ids == new.token_ids
    own.stop()
    own.start()
    assert one(own, prompt, GREEDY).token_ids == new.token_ids  # they stay, and the cache was empty
    own.update_params(surge.model.params)
    assert one(own, prompt, GREEDY).token_ids == old.token_ids
    assert one(surge, prompt, GREEDY).token_ids == old.token_ids


def test_a_request_under_way_goes_on_as_if_the_new_weights_had_read_all_of_it(
    own: vSurge, others: Any
) -> None:
    prompt = own.processor.encode(STORY)
    old = one(own, prompt, GREEDY).token_ids
    generation = own.generate(prompt, GREEDY)
    next(iter(generation))
    own.pause()  # so that it is known where it stands
    [before] = generation._latest()
    own.update_params(others)
    own.resume()
    [after] = generation.result(TIMEOUT_S)
    length = before.num_generated_tokens
    assert 1 <= length < 60
    assert after.token_ids[:length] == old[:length]
    rest = one(own, [*prompt, *old[:length]], replace(GREEDY, max_tokens=60 - length))
    assert after.token_ids[length:] == rest.token_ids
    assert after.num_preemptions == after.metrics.num_preemptions == 1


@pytest.mark.parametrize("step", [2, 8], ids=["while the prompt is read", "when there is output"])
def test_a_prompt_is_scored_by_the_weights_that_give_the_first_token(
    own: vSurge, others: Any, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    prompt, params = own.processor.encode(STORY * 8)[:90], replace(GREEDY, max_tokens=30, prompt_logprobs=0)
    assert max(own._executor.mixed_buckets) == 40  # so that the prompt takes three steps
    old, run, steps = one(own, prompt, params), own._executor.run, count(1)

    def swapping(plan: StepPlan) -> Any:
        if next(steps) == step:
            own._engine.update(others)
        return run(plan)

    monkeypatch.setattr(own._executor, "run", swapping)
    under_way = one(own, prompt, params)
    new = one(own, prompt, params)
    assert (new.num_preemptions, under_way.num_preemptions) == (0, 1)
    assert old.prompt_logprobs != new.prompt_logprobs
    assert under_way.prompt_logprobs == (new if step == 2 else old).prompt_logprobs
    assert (under_way.token_ids == new.token_ids) == (step == 2)


def test_swapping_weights_at_any_moment_loses_and_doubles_no_token(own: vSurge, others: Any) -> None:
    params = replace(GREEDY, max_tokens=100)
    alone = one(own, STORY, params).token_ids
    generations = [own.generate(STORY, params) for _ in range(6)]
    num_swaps = 0
    while not all(generation._channel.is_over() for generation in generations):
        own.update_params(own.model.params)  # equal ones, so that the answer must not change
        next(iter(generations[-1]))  # some step later
        num_swaps += 1
    assert num_swaps > 3
    assert [g.result(TIMEOUT_S)[0].token_ids for g in generations] == [alone] * 6
    mixed = [own.generate(STORY, params) for _ in range(6)]
    for weights in (others, own.model.params) * 3:
        own.update_params(weights)
    assert all(len(g.result(TIMEOUT_S)[0].token_ids) == 100 for g in mixed)


@pytest.mark.parametrize("spoiled", [{"final_norm"}, {"layers"}])
def test_weights_that_are_no_numbers_fail_requests_and_leave_nothing_in_the_cache(
    own: vSurge, spoiled: set[str]
) -> None:
    params = own.model.params
    before = one(own, STORY, GREEDY).token_ids
    broken = jax.tree.map(lambda array: array * jnp.nan, {name: getattr(params, name) for name in spoiled})
    own.update_params(replace(params, **broken))
    with pytest.raises(StepFailed, match=r"the model's logits after \d+ tokens hold NaN or infinity"):
        one(own, STORY, GREEDY)
    own.update_params(params)
    assert one(own, STORY, GREEDY).token_ids == before


def test_the_callers_arrays_are_not_the_engines(own: vSurge, others: Any) -> None:
    mine = jax.tree.map(jnp.copy, others)
    own.update_params(mine)
    before = one(own, STORY, GREEDY).token_ids
    for leaf in jax.tree.leaves(mine):
        leaf.delete()  # as a training step does that donates them
    assert one(own, STORY, GREEDY).token_ids == before
    with pytest.raises(ValueError, match=r"^params\.embedding: was deleted, or donated"):
        own.update_params(mine)
    given = jax.tree.map(np.asarray, others)  # NumPy's are taken too
    own.update_params(given)
    assert one(own, STORY, GREEDY).token_ids == before


def addresses(array: jax.Array) -> set[int]:
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}


def test_the_old_weights_are_let_go(own: vSurge, model: Model, others: Any) -> None:
    own.update_params(others)
    replaced = addresses(own.model.params.embedding)
    own.update_params(model.params)
    held = [addresses(holder) for holder in jax.live_arrays() if not holder.is_deleted()]
    assert replaced.isdisjoint(set[int]().union(*held))


def test_new_weights_lie_where_the_old_ones_did(own: vSurge, others: Any) -> None:
    before = [leaf.sharding for leaf in jax.tree.leaves(own.model.params)]
    own.update_params(jax.tree.map(np.asarray, others))
    assert [leaf.sharding for leaf in jax.tree.leaves(own.model.params)] == before


def changed(params: Any, **first_layer: Any) -> Any:
    return replace(params, layers=(replace(params.layers[0], **first_layer), *params.layers[1:]))


def test_weights_that_do_not_fit_are_refused_by_the_first_array_that_differs(own: vSurge) -> None:
    params = own.model.params
    norm = params.layers[0].input_norm
    assert norm.shape == (192,)
    cases: list[tuple[Any, type[Exception], str]] = [
        (
            changed(params, input_norm=norm[:-1], q_norm=None),
            ValueError,
            r"^params\.layers\[0\]\.input_norm: is float32\[191\], must be float32\[192\]$",
        ),
        (
            changed(params, input_norm=norm.astype("bfloat16")),
            ValueError,
            r"^params\.layers\[0\]\.input_norm: is bfloat16\[192\], must be float32\[192\]$",
        ),
        (
            changed(params, input_norm=None),
            ValueError,
            r"^params: has \.layers\[0\]\.q_proj where the engine's weights have \.layers\[0\]\.input_norm$",
        ),
        (replace(params, layers=params.layers[:-1]), ValueError, r"^params: has \.final_norm where .*\[3\]"),
        (replace(params, lm_head=norm), ValueError, r"^params: has \.lm_head; \d+ arrays, the .* are \d+$"),
        (replace(params, final_norm=None), ValueError, r"^params: lacks \.final_norm; \d+ arrays"),
        (changed(params, input_norm=2.0), TypeError, r"input_norm: is a float, must be an array"),
        (list(jax.tree.leaves(params)), ValueError, r"^params: has \[0\] where .* \.embedding$"),
        (own.model, TypeError, r"^params: is a Model, must be a Params like model\.params$"),
        ({}, ValueError, r"^params: lacks \.embedding; 0 arrays"),
    ]
    before = one(own, STORY, GREEDY).token_ids
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            own.update_params(given)
    assert own.model.params is params
    assert one(own, STORY, GREEDY).token_ids == before


def test_new_weights_wait_for_the_step_under_way_and_for_no_other(
    scripted: Scripted,
) -> None:
    scripted.executor.hold()
    generation = scripted.surge.generate([1], LONG)
    scripted.executor.let(3)
    scripted.executor.wait_until_held()
    with ThreadPoolExecutor(1) as pool:
        update = pool.submit(scripted.surge.update_params, scripted.surge.model.params)
        while scripted.surge._engine._inbox._messages.empty() and not update.done():
            pass
        assert not scripted.executor.weights
        scripted.executor.let(1)  # the one it stood in
        update.result(TIMEOUT_S)
    assert scripted.executor.num_steps == 4
    assert len(scripted.executor.weights) == 1
    scripted.executor.let(None)
    assert generation.result(TIMEOUT_S)[0].num_preemptions == 1


def test_an_engine_that_is_paused_stopped_or_failed_takes_weights_too(
    make_scripted: Callable[..., Scripted],
) -> None:
    scripted = make_scripted()
    params, weights = scripted.surge.model.params, scripted.executor.weights
    scripted.surge.update_params(params)
    assert len(weights) == 1
    scripted.surge.start()
    scripted.surge.pause()
    scripted.surge.update_params(params)
    assert len(weights) == 2
    assert scripted.surge.is_paused
    scripted.surge.resume()
    scripted.executor.hold()
    scripted.executor.error = SystemExit()
    failed = scripted.surge.generate([1], LONG)
    scripted.executor.wait_until_held()
    with ThreadPoolExecutor(1) as pool:
        update = pool.submit(scripted.surge.update_params, params)  # while the thread goes down
        scripted.executor.let(None)
        update.result(TIMEOUT_S)
    assert len(weights) == 3
    with pytest.raises(Exception, match="the engine's thread failed"):
        failed.result(TIMEOUT_S)
    assert weights[-1] is scripted.surge.model.params
