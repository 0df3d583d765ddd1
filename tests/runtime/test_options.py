"""Options and prompts that cannot work are refused at the door, by name; buckets; what stays free of JAX."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from vsurge.model import Model
from vsurge.runtime import OutOfMemory, SamplingParams, vSurge
from vsurge.runtime.cache_size import CPU_CACHE_BYTES, choose_num_pages, page_bytes
from vsurge.runtime.executor import MAX_PROGRAMS, Executor, default_buckets
from vsurge.runtime.page_pool import PagePool
from vsurge.runtime.prompts import as_list, token_ids_of

from .conftest import TIMEOUT_S, Scripted

CHAT = [{"role": "user", "content": "Hi"}]
FREE_OF_JAX = (
    "channel", "detokenizer", "errors", "generation", "page_pool", "prompts", "request", "sampling_params",
    "scheduler",
)  # fmt: skip


def test_the_bookkeeping_works_where_jax_cannot_be_imported() -> None:
    # The package's own __init__ imports the engine, so a bare package stands in for it.
    script = f"""
import importlib, pathlib, sys, types
sys.modules["jax"] = sys.modules["vsurge.model"] = sys.modules["vsurge.kernels"] = None
import vsurge
room = types.ModuleType("vsurge.runtime")
room.__path__ = [str(pathlib.Path(vsurge.__file__).parent / "runtime")]
sys.modules["vsurge.runtime"] = room
for name in {FREE_OF_JAX}:
    importlib.import_module("vsurge.runtime." + name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_concurrent_decodes": 0}, ValueError, "max_concurrent_decodes=0: must be at least 1"),
        ({"max_concurrent_prefill": -1}, ValueError, "max_concurrent_prefill=-1: must be at least 1"),
        ({"max_concurrent_decodes": 2.0}, TypeError, "max_concurrent_decodes=2.0: must be an integer"),
        ({"page_size": 0}, ValueError, "page_size=0"),
        ({"num_pages": 0}, ValueError, "num_pages=0"),
        ({"max_queued_requests": 0}, ValueError, "max_queued_requests=0"),
        ({"seed": -1}, ValueError, "seed=-1: must be at least 0"),
        ({"max_length": 1}, ValueError, "max_length=1: must lie between 2 and the model's 1024"),
        ({"max_length": 1025}, ValueError, "max_length=1025"),
        (
            {"max_prefill_length": 200, "max_length": 100},
            ValueError,
            "max_prefill_length=200: .* 1 and max_l",
        ),
        ({"prefill_lengths": []}, ValueError, r"prefill_lengths=\[\]"),
        ({"prefill_lengths": [0, 8]}, ValueError, r"prefill_lengths=\[0, 8\]: must be positive"),
        (
            {"prefill_lengths": [8], "max_prefill_length": 9},
            ValueError,
            "largest must be max_prefill_length=9",
        ),
        ({"memory_utilization": 0.0}, ValueError, r"memory_utilization=0.0: must lie in \(0, 1\]"),
        ({"memory_utilization": 1.1}, ValueError, "memory_utilization=1.1"),
        ({"extra_eos_token_ids": [1536]}, ValueError, "extra_eos_token_ids: token id 1536 is outside"),
        ({"processor": object()}, TypeError, "processor=object"),
    ],
)
@pytest.mark.usefixtures("no_type_checker")
def test_an_option_that_cannot_work_is_refused_by_name(
    model: Model, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vSurge.from_model(model, **options)


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        ([], None, ValueError, "prompts: is empty"),
        ("", None, ValueError, r"prompts\[0\]: has no tokens"),
        ([[1], []], None, ValueError, "prompt: is empty"),
        ([1, 1536], None, ValueError, r"prompts\[0\]: token id 1536 is outside the vocabulary, 0 to 1535"),
        ([[1], [-1]], None, ValueError, r"prompts\[1\]: token id -1"),
        ([1, "a"], None, TypeError, "prompt=1: must be a string, token ids or chat messages"),
        ([[1, "a"]], None, TypeError, "'a' is no token id, but other items are"),
        ([{"role": "user"}], None, TypeError, "neither a token id nor a message with 'role' and 'content'"),
        (5, None, TypeError, "prompts=5"),
        ([1] * 160, None, ValueError, "160 tokens, must be fewer than max_length=160; truncate_prompt"),
        (["a", "b"], [SamplingParams()], ValueError, "sampling_params: 1 of them for 2 prompts"),
        (["a"], ["b"], TypeError, "sampling_params: 'b' is no SamplingParams"),
        ("a", SamplingParams(stop_token_ids=[9999]), ValueError, "stop_token_ids: token id 9999"),
        (
            "a", SamplingParams(stop_token_ids=list(range(15)), min_tokens=1), ValueError,
            "stop_token_ids: 17 with the end-of-sequence tokens, with min_tokens at most 16",
        ),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_type_checker")
def test_a_prompt_or_parameter_that_cannot_work_is_refused_by_name_and_nothing_is_queued(
    scripted: Scripted, prompts: Any, params: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scripted.surge.generate(prompts, params)
    scripted.surge.generate([9], SamplingParams(max_tokens=1)).result(TIMEOUT_S)
    assert scripted.executor.num_steps == 1


def test_options_of_a_chat_template_need_a_chat(scripted: Scripted) -> None:
    with pytest.raises(ValueError, match=r"chat_template_kwargs=.*no prompt is a list of chat messages"):
        scripted.surge.generate("a", chat_template_kwargs={"enable_thinking": False})


def test_a_request_larger_than_the_cache_is_refused_with_numbers(
    make_scripted: Callable[..., Scripted],
) -> None:
    scripted = make_scripted(num_pages=3)
    scripted.surge.start()
    with pytest.raises(
        ValueError, match=r"its 20 tokens and max_tokens=30 more need 4 pages of 16 .* has 3;"
    ):
        scripted.surge.generate([1] * 20, SamplingParams(max_tokens=30))
    [sample] = scripted.surge.generate([1] * 20, SamplingParams(max_tokens=29)).result(TIMEOUT_S)
    assert sample.num_generated_tokens == 29  # 48 tokens in the cache: the last one is not written


def test_a_single_prompt_of_any_form_is_a_list_of_one(scripted: Scripted) -> None:
    for prompts, count in (
        ("a b", 1),
        ([1, 2], 1),
        (CHAT, 1),
        (["a", "b"], 2),
        ([[1], [2]], 2),
        ([CHAT] * 2, 2),
    ):
        assert len(scripted.surge.generate(prompts, SamplingParams(max_tokens=1)).result(TIMEOUT_S)) == count
    mixed = scripted.surge.generate(["a", [1, 2], CHAT], SamplingParams(max_tokens=1)).result(TIMEOUT_S)
    assert [s.num_prompt_tokens for s in mixed] == [
        scripted.surge.count_tokens(p) for p in ("a", [1, 2], CHAT)
    ]


def test_each_prompt_may_have_its_own_parameters(scripted: Scripted) -> None:
    params = [SamplingParams(max_tokens=count) for count in (3, 1, 2)]
    samples = scripted.surge.generate([[1], [2], [3]], params).result(TIMEOUT_S)
    assert [s.num_generated_tokens for s in samples] == [3, 1, 2]


def test_without_a_processor_prompts_are_token_ids_and_there_is_no_text(
    make_scripted: Callable[..., Scripted],
) -> None:
    scripted = make_scripted(processor=None)
    scripted.surge.start()
    [sample] = scripted.surge.generate([1, 2], SamplingParams(max_tokens=3)).result(TIMEOUT_S)
    assert (sample.text, sample.num_generated_tokens) == ("", 3)
    for prompt in ("a", CHAT):
        with pytest.raises(
            ValueError, match="needs a processor; without one, prompts are lists of token ids"
        ):
            scripted.surge.generate(prompt)
    with pytest.raises(ValueError, match="stop strings need a processor"):
        scripted.surge.generate([1], SamplingParams(stop="x"))


def test_what_a_chat_template_refuses_is_a_value_error(tokenizer: Any) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="the chat template refuses its messages: roles must alternate"):
        token_ids_of(CHAT, tokenizer, {"chat_template": template})


def test_a_tokenizer_adds_its_own_special_tokens_to_a_string_but_not_to_a_chat() -> None:
    calls: list[dict[str, Any]] = []

    def encode(text: str, **options: Any) -> list[int]:
        calls.append(options)
        return [1]

    processor = SimpleNamespace(encode=encode, apply_chat_template=lambda *_, **__: "text")
    token_ids_of("a", processor, None)
    token_ids_of(CHAT, processor, None)
    assert calls == [{}, {"add_special_tokens": False}]


def test_as_list_tells_one_prompt_from_many() -> None:
    assert as_list("ab") == ["ab"]
    assert as_list(["a", "b"]) == ["a", "b"]
    assert as_list((1, 2)) == [(1, 2)]
    assert as_list(CHAT) == [CHAT]


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
    assert 2 <= len(executor.decode_buckets) + len(executor.prefill_buckets) <= 16
    assert executor.decode_buckets[-1] == rows


def test_the_cache_is_as_large_as_it_can_be_of_use_and_no_larger_than_its_budget(model: Model) -> None:
    size = page_bytes(model, 128)
    assert size == 4 * 2 * 2 * 64 * 4 * 128  # layers, keys and values, heads, head_dim, bytes, tokens

    def pages(useful: int, page_size: int = 128) -> int:
        return choose_num_pages(model, page_size=page_size, memory_utilization=0.9, max_useful_pages=useful)

    assert pages(12) == 12
    assert pages(10**9) == CPU_CACHE_BYTES // size
    with pytest.raises(
        OutOfMemory, match=r"one page of 1000000 tokens takes .* the cache may take 1024.0 MiB"
    ):
        pages(1, page_size=1_000_000)
    surge = vSurge.from_model(model, max_concurrent_decodes=3, max_length=200)
    assert surge.num_pages == 6  # every row has room for a sequence of max_length


@pytest.mark.usefixtures("no_type_checker")  # the stand-in is no Model
def test_an_accelerators_cache_is_a_share_of_what_the_weights_leave() -> None:
    gib = 1 << 30
    device = SimpleNamespace(
        platform="tpu", memory_stats=lambda: {"bytes_limit": 16 * gib, "bytes_in_use": 6 * gib}
    )
    config = SimpleNamespace(num_layers=2, num_kv_heads=8, head_dim=128, cache_dtype=np.dtype(jnp.bfloat16))
    model: Any = SimpleNamespace(config=config, mesh=SimpleNamespace(devices=SimpleNamespace(flat=[device])))
    num_pages = choose_num_pages(model, page_size=128, memory_utilization=0.5, max_useful_pages=10**9)
    assert num_pages == 5 * gib // (2 * 2 * 8 * 128 * 2 * 128)


def test_an_argument_of_a_wrong_type_is_caught_by_the_type_checker() -> None:
    with pytest.raises(TypeCheckError):
        PagePool("4", 16)  # pyright: ignore[reportArgumentType]
