"""The engine with the demo checkpoint: a request's output depends on the request alone."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import jax
import pytest

from vsurge.model import Model
from vsurge.runtime import SamplingParams, vSurge
from vsurge.runtime.channel import Channel
from vsurge.runtime.executor import compiler_options
from vsurge.runtime.request import Request
from vsurge.runtime.step import StepOutput
from vsurge.runtime.step_plan import StepPlan

from .chunks import output_index
from .compilations import heard
from .greedy import CAPITAL, GREEDY, STORY, one
from .kinds import KINDS
from .scripted import TIMEOUT_S, pool_of

PROMPTS = [
    CAPITAL,
    STORY,
    "Hello",
    "東京は",
    "USER:Explain the concept of recursion\nASSISTANT:",
    " ".join(["a long prompt of many chunks"] * 12),
]


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    with heard() as events:
        yield events


def test_the_listener_below_does_hear_compilations(compilations: list[str]) -> None:
    jax.jit(lambda x: x + random.random())(1.0)  # never seen before
    assert compilations


def test_nothing_is_compiled_while_serving(surge: vSurge, compilations: list[str]) -> None:
    rng, num_preemptions = random.Random(0), surge.metrics.num_preemptions
    kinds = [*KINDS, {"n": 2, "temperature": 0.9}, {"n": 2, "best_of": 3, "temperature": 1.2, "logprobs": 0}]
    rng.shuffle(kinds)
    generations = []
    for i in range(60):
        params = SamplingParams(
            max_tokens=rng.randint(1, 20),
            min_tokens=rng.choice([0, 1]),
            temperature=rng.choice([0.0, 0.7, 1.5]),
            top_k=rng.choice([0, 1, 20, 5000, 2**40]),
            top_p=rng.choice([1.0, 0.9, 1e-9]),
            min_p=rng.choice([0.0, 0.1]),
            seed=rng.choice([None, 2**64 - 1]),
            stop=rng.choice([None, "the"]),
            ignore_eos=rng.random() < 0.5,
        )
        if rng.random() < 0.7:
            params = replace(params, **({"max_tokens": 24} | kinds[i % len(kinds)]))
        prompts = [[rng.randrange(1500)] * rng.randint(1, 100) for _ in range(rng.randint(1, 3))]
        generations.append(surge.generate(prompts, params))
        if rng.random() < 0.3:
            rng.choice(generations).abort()
        if rng.random() < 0.2:
            generations[-1].result(TIMEOUT_S)
    for generation in generations:
        generation.result(TIMEOUT_S)
    assert surge.metrics.num_preemptions > num_preemptions
    assert compilations == []


def test_greedy_output_in_a_batch_is_that_of_each_prompt_alone(surge: vSurge) -> None:
    alone = [one(surge, prompt).token_ids for prompt in PROMPTS]
    together = surge.generate(PROMPTS, GREEDY).result(TIMEOUT_S)
    assert [sample.token_ids for sample in together] == alone
    assert len(set(alone)) == len(alone)


def test_a_token_does_not_depend_on_how_its_prefix_came_into_the_cache(surge: vSurge) -> None:
    prompt = surge.processor.encode(PROMPTS[5])
    assert len(prompt) > 80  # at least three chunks, the last of them in the smaller bucket or not
    whole = one(surge, prompt).token_ids
    for cut in (1, 7, 15):  # the generated tokens as part of the prompt: prefilled instead of decoded
        assert one(surge, [*prompt, *whole[:cut]]).token_ids[: 24 - cut] == whole[cut:]


def test_a_seeded_request_gives_the_same_text_alone_and_in_any_batch(surge: vSurge) -> None:
    params = SamplingParams(temperature=2.5, top_p=0.98, seed=2**63 + 11, max_tokens=24, ignore_eos=True)
    alone = one(surge, STORY, params)
    assert one(surge, STORY, params).text == alone.text
    for others in (PROMPTS, PROMPTS[::-1], [STORY] * 3):
        noise = SamplingParams(temperature=1.3, max_tokens=17, ignore_eos=True)
        samples = surge.generate([*others, STORY], [noise] * len(others) + [params]).result(TIMEOUT_S)
        assert samples[-1].token_ids == alone.token_ids
    other_seed = replace(params, seed=11)  # differs in the upper half only
    assert one(surge, STORY, other_seed).text != alone.text


def test_unseeded_requests_differ_from_each_other(surge: vSurge) -> None:
    params = SamplingParams(temperature=2.5, max_tokens=24, ignore_eos=True)
    assert len({one(surge, STORY, params).text for _ in range(4)}) == 4


def test_unseeded_requests_repeat_with_the_engines_seed(model: Model) -> None:
    def drawn(seed: int) -> list[int]:
        surge = vSurge.from_model(model, num_pages=2, max_concurrent_decodes=1, seed=seed, verbose=False)
        return [surge._requests.draw_seed() for _ in range(3)]

    assert drawn(1) == drawn(1)
    assert len({*drawn(1), *drawn(2)}) == 6
    assert max(drawn(1)) > 2**32


def test_requests_wait_when_pages_run_out_and_all_give_what_they_give_alone(
    surge: vSurge, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 24 pages of 16 tokens: each of these needs 4 to 10, so four rows cannot always be filled
    prompts = [[10 + i] * (40 + 6 * i) for i in range(10)]
    params = replace(GREEDY, max_tokens=25 + 20, ignore_eos=True)
    alone = [one(surge, prompt, params).token_ids for prompt in prompts]
    run, used = surge._executor.run, list[int]()

    def counting_run(plan: StepPlan) -> StepOutput:  # in the engine's thread, to which the pool belongs
        pool_of(surge).check_integrity()
        used.append(pool_of(surge).num_used)
        return run(plan)

    monkeypatch.setattr(surge._executor, "run", counting_run)
    samples = surge.generate(prompts, params).result(TIMEOUT_S)
    assert [sample.token_ids for sample in samples] == alone
    assert 15 <= max(used) <= 24


def test_requests_join_and_leave_between_steps(surge: vSurge, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {prompt: one(surge, prompt, max_tokens=60).token_ids for prompt in PROMPTS[:3]}
    run, leaving, has_left = surge._executor.run, surge.processor.encode(PROMPTS[1]), threading.Event()

    def run_but_not_to_its_end(plan: StepPlan) -> StepOutput:
        if any(chunk.request.prompt_ids == leaving and output_index(chunk) == 30 for chunk in plan.chunks):
            assert has_left.wait(TIMEOUT_S)
        return run(plan)

    monkeypatch.setattr(surge._executor, "run", run_but_not_to_its_end)

    async def join_and_leave() -> list[tuple[int, ...]]:
        first = surge.generate(PROMPTS[0], replace(GREEDY, max_tokens=60))
        await anext(first)
        left = surge.generate(PROMPTS[1], replace(GREEDY, max_tokens=60))
        await anext(left)
        await left.aclose()
        has_left.set()
        joined = surge.generate(PROMPTS[2], replace(GREEDY, max_tokens=60))
        return [(await g)[0].token_ids for g in (first, left, joined)]

    async def bounded() -> list[tuple[int, ...]]:
        return await asyncio.wait_for(join_and_leave(), TIMEOUT_S)

    first, left, joined = asyncio.run(bounded())
    assert (first, joined) == (alone[PROMPTS[0]], alone[PROMPTS[2]])
    assert left == alone[PROMPTS[1]][: len(left)]
    assert 0 < len(left) < 60


def test_two_engines_serve_side_by_side(surge: vSurge, model: Model) -> None:
    other = vSurge.from_model(
        model, surge.processor, max_concurrent_decodes=4, max_concurrent_prefill=3, prefill_lengths=(16, 40),
        max_length=160, page_size=16, num_pages=24, verbose=False,
    )  # fmt: skip
    other._executor._programs = surge._executor._programs  # of the same shapes: saves compiling
    alone = one(surge, STORY).token_ids
    with other:
        generations = [engine.generate(STORY, GREEDY) for engine in (surge, other) for _ in range(3)]
        assert [g.result(TIMEOUT_S)[0].token_ids for g in generations] == [alone] * 6
        other.pause()
        waits = other.generate(STORY, GREEDY)
        assert one(surge, STORY).token_ids == alone
        assert not surge.abort(waits.request_ids[0])
        other.resume()
        assert waits.result(TIMEOUT_S)[0].token_ids == alone
        assert other.metrics.num_finished == 4
    assert one(surge, STORY).token_ids == alone


def test_an_engine_starts_again_with_an_empty_cache(surge: vSurge) -> None:
    before = one(surge, STORY).token_ids
    surge.stop()
    assert surge._executor._kv_pages == ()
    surge.start()
    assert one(surge, STORY).token_ids == before


def test_a_chat_goes_through_the_template_with_its_options(surge: vSurge) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = surge.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert one(surge, chat).token_ids == one(surge, text).token_ids
    assert surge.count_tokens(chat) == one(surge, chat).num_prompt_tokens
    options = {"enable_thinking": False}
    closed = surge.generate(chat, GREEDY, chat_template_kwargs=options).result(TIMEOUT_S)
    assert closed[0].num_prompt_tokens == surge.count_tokens(chat, chat_template_kwargs=options)
    two = surge.generate([chat, chat], GREEDY).result(TIMEOUT_S)
    assert len(two) == 2


def test_the_models_generation_config_gives_the_defaults(surge: vSurge) -> None:
    assert surge.default_sampling_params() == SamplingParams(temperature=0.0)
    greedy = one(surge, STORY, max_tokens=16, ignore_eos=False)
    [sample] = surge.generate(STORY).result(TIMEOUT_S)
    assert sample.token_ids == greedy.token_ids
    assert surge.eos_token_ids == (1535, 1533)


def test_a_sample_tells_how_long_it_took(surge: vSurge) -> None:
    sample = one(surge, STORY)
    assert sample.time_to_first_token_s is not None
    assert 0 < sample.time_to_first_token_s < sample.num_generated_tokens / sample.tokens_per_second


def test_a_level_of_optimization_that_xla_flags_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    assert compiler_options("cpu") == {"xla_backend_optimization_level": 1}
    lowered = jax.jit(lambda x: x + 1.0).lower(1.0)
    assert lowered.compile(compiler_options("cpu"))(1.0) == 2.0  # XLA knows the option
    assert compiler_options("gpu") is compiler_options("tpu") is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert compiler_options("cpu") is None


@pytest.mark.parametrize("kind", ["finished", "aborted", "of several completions"])
def test_what_has_ended_is_freed_without_the_garbage_collector(surge: vSurge, kind: str) -> None:
    """It would come after thousands of requests, and memory would grow until then.

    Only a row of the batch remembers who had it last.
    """
    params = SamplingParams(max_tokens=3, n=2 if kind == "of several completions" else 1)
    num_rows = max(surge._executor.decode_buckets)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3 * num_rows):
            generation = surge.generate([CAPITAL, STORY], params)
            if kind == "aborted":
                generation.abort()
            generation.result(TIMEOUT_S)
        del generation
        surge.stop(drain=True)  # so that the engine's thread looks at nothing of it any more
        left = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in (Request, Channel))
        assert all(count <= num_rows for count in left.values())
    finally:
        gc.enable()
