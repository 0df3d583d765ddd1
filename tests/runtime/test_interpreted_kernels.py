"""The whole engine on the kernels for TPU and for GPU, which are interpreted here."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerBase

from vsurge.kernels import Implementation, append, decode, ragged
from vsurge.model import Model
from vsurge.runtime import vSurge
from vsurge.runtime.executor import Executor
from vsurge.runtime.step_plan import StepKind

from ..devices import TP
from ..kernels.jaxprs import equations
from .greedy import CAPITAL, GREEDY
from .scripted import TIMEOUT_S

pytestmark = pytest.mark.usefixtures("small_units")


def engine(model: Model, tokenizer: PreTrainedTokenizerBase) -> vSurge:
    return vSurge.from_model(
        model,
        tokenizer,
        max_length=64,
        max_concurrent_decodes=1,
        max_prefill_length=16,
        page_size=16,
        num_pages=10,
    )


def answer(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    with engine(model, tokenizer) as surge:
        [sample] = surge.generate(CAPITAL, replace(GREEDY, max_tokens=5)).result(10 * TIMEOUT_S)
        return list(sample.token_ids)


def on_kernels(model: Model, implementation: Implementation = "mosaic_tpu") -> Model:
    config = replace(model.config, attention=implementation, decode_attention=implementation)
    return replace(model, config=config)


# What a layer of each kind of step is made of: a decode step's attention writes the cache itself.
EXPECTED: dict[StepKind, set[str]] = {
    "decode": {"paged_decode_attention"},
    "mixed": {"append_kv", "paged_decode_attention", "ragged_paged_attention"},
}


def assert_made_of_kernels(model: Model, tokenizer: PreTrainedTokenizerBase, kind: StepKind) -> None:
    """Every layer of a step has each kernel once, and nothing else attends."""
    surge = engine(model, tokenizer)
    executor = surge._executor
    assert isinstance(executor, Executor)
    size = (executor.decode_buckets if kind == "decode" else executor.mixed_buckets)[0]
    program = executor._trace(kind, size).jaxpr.jaxpr
    kernels = Counter(e.params["name"] for e in equations(program) if e.primitive.name == "pallas_call")
    assert kernels == dict.fromkeys(EXPECTED[kind], model.config.num_layers)


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_layer_of_a_step_runs_the_kernels(
    model: Model, tokenizer: PreTrainedTokenizerBase, kind: StepKind
) -> None:
    assert_made_of_kernels(on_kernels(model), tokenizer, kind)


@pytest.mark.parametrize(
    ("kind", "table"),
    [("decode", decode.FUSED), ("mixed", ragged.IMPLEMENTATIONS), ("mixed", append.IMPLEMENTATIONS)],
    ids=["decode", "ragged", "append"],
)
def test_a_step_that_falls_back_is_noticed(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    kind: StepKind,
    table: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if table is decode.FUSED:
        monkeypatch.delitem(table, "mosaic_tpu")  # and XLA's after it
        monkeypatch.setitem(decode.IMPLEMENTATIONS, "mosaic_tpu", decode.IMPLEMENTATIONS["xla"])
        monkeypatch.setitem(append.IMPLEMENTATIONS, "mosaic_tpu", append.IMPLEMENTATIONS["xla"])
    else:

        def fallback(*arguments: object, return_lse: bool = True, **options: object) -> object:
            return table["xla"](*arguments, **options)

        monkeypatch.setitem(table, "mosaic_tpu", fallback)
    with pytest.raises(AssertionError):
        assert_made_of_kernels(on_kernels(model), tokenizer, kind)


@pytest.mark.parametrize(
    ("implementation", "num_layers"),
    [("mosaic_tpu", 2), ("triton", 2), pytest.param("mosaic_tpu", 4, marks=pytest.mark.slow)],
)
def test_the_demo_checkpoint_answers_with_the_same_tokens(
    model: Model, tokenizer: PreTrainedTokenizerBase, implementation: Implementation, num_layers: int
) -> None:
    """Through a prompt in chunks, and decoding; by its first layers, or by all."""
    if implementation == "mosaic_tpu" and TP > 1:
        pytest.skip("kernels for TPU that are interpreted on several CPU devices have been seen to hang")
    config = replace(model.config, num_layers=num_layers)
    first = replace(
        model, config=config, params=replace(model.params, layers=model.params.layers[:num_layers])
    )
    assert answer(on_kernels(first, implementation), tokenizer) == answer(first, tokenizer)
