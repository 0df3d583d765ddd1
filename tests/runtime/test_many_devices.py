"""An engine on many devices says what it says on one, and neither logits nor cache leave their devices."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np
import pytest

from ..devices import printed_by

VOCAB, HIDDEN, LAYERS, ROWS, MIXED = 1536, 192, 4, 2, 16
ONE = "1,1,1,1,1"
# dims: into how many parts vocabulary and KV heads go
SAMPLE = {"1,1,1,4,1": (4, 2), "2,1,1,2,1": (2, 2)}
REST = {
    "1,1,1,2,1": (2, 2), "1,1,1,8,1": (8, 2), "1,2,1,4,1": (4, 2), "1,1,1,1,4": (1, 1), "1,2,1,2,2": (2, 2),
    "2,1,1,1,1": (1, 1), "2,1,1,4,1": (4, 2), "2,2,1,2,1": (2, 2), "2,1,1,2,2": (2, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    return printed_by("tests.runtime.many_devices", ONE, *SAMPLE)


@pytest.fixture(scope="module")
def rest() -> dict[str, Any]:
    return printed_by("tests.runtime.many_devices", ONE, *REST)


def assert_alike(found: dict[str, Any], expected: dict[str, Any], dims: str, parts: tuple[int, int]) -> None:
    """The same texts and tokens; log-probabilities to rounding; each device its share."""
    vocab, heads = parts
    assert found["greedy"] == expected["greedy"]
    assert found["sampled"] == expected["sampled"]
    for ours, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
        assert [len(each) for each in ours] == [len(each) for each in theirs]
        assert len(ours) > 5
        np.testing.assert_allclose([*chain(*ours)], [*chain(*theirs)], rtol=0, atol=1e-4)
    replicas, *within = (int(size) for size in dims.split(","))
    num_devices = replicas * math.prod(within)
    assert found["cache"] == [[16 // replicas, 2, 2 // heads, 16, 64]] * num_devices
    assert found["bias"] == [[ROWS // replicas, VOCAB // vocab]] * num_devices
    assert found["busy"] == replicas


@pytest.mark.parametrize("dims", SAMPLE)
def test_a_mesh_answers_as_one_device_does(sample: dict[str, Any], dims: str) -> None:
    assert_alike(sample[dims], sample[ONE], dims, SAMPLE[dims])
    assert " Paris" in sample[ONE]["greedy"][0]


@pytest.mark.slow
@pytest.mark.parametrize("dims", REST)
def test_any_mesh_answers_as_one_device_does(rest: dict[str, Any], dims: str) -> None:
    assert_alike(rest[dims], rest[ONE], dims, REST[dims])


def test_what_a_step_sends_besides_its_layers_sums_is_tiny(sample: dict[str, Any]) -> None:
    """A row's logits are VOCAB numbers, a page of the cache 4,096; the most is 20 tokens of each part."""
    expected = {"decode": ROWS * HIDDEN, "mixed": MIXED * HIDDEN}
    for kind, layer in expected.items():
        sent = {(op, size): n for of, op, size, n in sample["1,1,1,4,1"]["sent"] if of == kind}
        assert sent.pop(("all-reduce", layer)) == 2 * LAYERS + 1
        scored = 64 if kind == "mixed" else 0  # tokens of prompts whose log-probabilities may be wanted
        assert max(size for _, size in sent) <= 4 * 20 * max(ROWS, scored)
        assert all(size <= max(ROWS, scored) for op, size in sent if op != "all-gather")
        assert {op for op, _ in sent} == {"all-reduce", "all-gather"}


def test_replicas_send_each_other_nothing(sample: dict[str, Any]) -> None:
    """Devices 0 and 1 are the first one, 2 and 3 the second."""
    assert sample["2,1,1,2,1"]["groups"] == [[0, 1], [2, 3]]
    assert sample["1,1,1,4,1"]["groups"] == [[0, 1, 2, 3]]
    sent = {op for _, op, *_ in sample["2,1,1,2,1"]["sent"]}
    assert sent == {"all-reduce", "all-gather"}


def test_one_device_sends_nothing(sample: dict[str, Any]) -> None:
    assert sample[ONE]["sent"] == []
