"""The time of a step is the sum of its parts, each at the rates that are assumed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from vsurge.planning import PlanAssumptions
from vsurge.planning.collectives import Collective, Interconnect
from vsurge.planning.deployment import Product
from vsurge.planning.timing import Attention, StepTime, time_of_step

# 1,000 bytes and a million operations a microsecond
ASSUMED = PlanAssumptions(1.0, 1.0, 1.0, 1.0, hop_us=0.0, logit_passes=2.0, step_us=7.0)
LINKS = Interconnect((2, 1), 1, 1.0, 0.0, 16)


def step(**changes: Any) -> StepTime:
    options: dict[str, Any] = {
        "products": [Product(1_000_000, 2_000_000), Product(500_000, 1_000_000, is_head=True)],
        "num_rows": 1,
        "num_logit_rows": 1,
        "local_vocab": 500,
        "attention": Attention(time_us=100.0, useful_bytes=5e4, useful_flops=1e6),
        "collectives": Counter({Collective("all-reduce", 3_000, 2): 4}),
        "interconnect": LINKS,
        "assumptions": ASSUMED,
        "cores": 1,
    }
    return time_of_step(**(options | changes))


def test_few_rows_wait_for_the_weights() -> None:
    time = step()
    assert time.parts == {
        "weights": 3000.0, "products": 0.0, "attention": 100.0, "interconnect": 12.0, "sampling": 4.0,
        "between steps": 7.0,
    }  # fmt: skip
    assert time.total == pytest.approx(3123)
    assert time.bound == "weights"
    assert time.ideal == pytest.approx(3050)
    assert time.roofline == pytest.approx(3050 / 3123)


def test_many_rows_wait_for_the_products_but_the_output_matrix_has_its_own() -> None:
    time = step(num_rows=2_000)
    assert (time.products, time.weights) == (4000.0, 1000.0)
    assert time.bound == "products"
    assert time.ideal == pytest.approx(4000 + 1 + 1)


def test_two_cores_halve_what_is_theirs() -> None:
    time = step(cores=2)
    assert (time.weights, time.sampling) == (1500.0, 2.0)
    assert (time.attention, time.interconnect) == (100.0, 12.0)


@pytest.mark.parametrize(
    ("changes", "part", "value"),
    [
        ({"gbytes_per_s": 2.0}, "weights", 1500.0),
        ({"logit_passes": 4.0}, "sampling", 8.0),
        ({"step_us": 9.0}, "between steps", 9.0),
    ],
)
def test_assumptions_have_their_effect(changes: dict[str, float], part: str, value: float) -> None:
    assert step(assumptions=replace(ASSUMED, **changes)).parts[part] == value  # pyright: ignore


def test_a_token_reads_its_experts_and_many_tokens_nearly_all() -> None:
    experts = Product(1_000, 2_000, experts=(8, 2))
    assert experts.flops(10) == 2 * 10 * 1_000 / 4
    assert experts.read_bytes(1) == pytest.approx(500)
    assert experts.read_bytes(2) == pytest.approx(2_000 * (1 - 0.75**2))
    assert experts.read_bytes(100) == pytest.approx(2_000, rel=1e-6)
