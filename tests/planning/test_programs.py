"""The engine's own steps, compiled for slices: what devices send, and that the cache stays where it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from vsurge.model import published_config
from vsurge.planning import parse_slice
from vsurge.planning.collectives import Collective, Sent
from vsurge.planning.deployment import Deployment, deploy
from vsurge.planning.programs import ProgramFacts, engine_options, facts_of, lower_step, with_layers
from vsurge.runtime.step_plan import StepKind

NUM_PAGES, PAGE_SIZE, CHUNK = 1000, 128, 512
LIKELIEST = 20  # tokens whose log-probabilities are told
SCORED = 64  # tokens of prompts that are scored together


@dataclass(frozen=True)
class Case:
    """A step of the first layers of a published model, on all devices of a slice."""

    model: str
    slice: str
    kind: StepKind
    num_layers: int = 2
    num_rows: int = 8

    def deployment(self) -> Deployment:
        slice_ = parse_slice(self.slice)
        return deploy(published_config(self.model), None, slice_, slice_.num_devices).of_layers(
            self.num_layers
        )

    @property
    def size(self) -> int:
        return self.num_rows if self.kind == "decode" else CHUNK


def compiled(case: Case) -> ProgramFacts:
    deployment = case.deployment()
    options = engine_options(
        deployment, num_rows=case.num_rows, max_length=4096, page_size=PAGE_SIZE, num_pages=NUM_PAGES,
        chunk=CHUNK,
    )  # fmt: skip
    return facts_of(lower_step(deployment, options, case.kind, case.size).compile(), case.kind, case.size)


def assert_sends_what_it_must(facts: ProgramFacts, case: Case) -> None:
    """A sum for each half of a layer, one for the embedding, and a number per row to choose tokens."""
    deployment = case.deployment()
    hidden, devices = deployment.config.hidden_size, deployment.tp
    sent = facts.sent.always
    large = Counter({one: count for one, count in sent.items() if one.num_bytes > 4 * case.num_rows})
    assert large == {
        Collective("all-reduce", case.size * hidden * 2, devices): 2 * case.num_layers + 1,
    }
    assert {one.kind for one in sent} == {"all-reduce"}
    told = max(case.num_rows, SCORED if case.kind == "mixed" else 0) * LIKELIEST * devices * 4
    assert max(one.num_bytes for one in facts.sent.sometimes) <= told  # of logits it would be thousands a row
    assert {one.kind for one in facts.sent.sometimes} <= {"all-reduce", "all-gather"}


def assert_cache_stays_in_place(facts: ProgramFacts, case: Case) -> None:
    """Cache and rows are the outputs' own memory; no layer's copy has room among the temporaries."""
    deployment = case.deployment()
    cache = NUM_PAGES * deployment.page_bytes(PAGE_SIZE)
    rows = deployment.row_state_bytes(case.num_rows)
    assert cache + rows <= facts.aliased <= cache + 1.5 * rows + 2**20
    assert facts.outputs - facts.aliased < 2**20
    assert facts.arguments >= deployment.weight_bytes() + cache
    assert facts.temporaries < cache / case.num_layers


def check(case: Case) -> None:
    facts = compiled(case)
    assert_sends_what_it_must(facts, case)
    assert_cache_stays_in_place(facts, case)


def test_a_decode_step_of_8b_on_four_chips() -> None:
    check(Case("8B", "v6e:2x2", "decode", num_layers=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("8B", "v6e:2x2", "decode"),
        Case("8B", "v6e:2x2", "mixed"),
        Case("32B", "v6e:2x4", "decode"),
        Case("32B", "v6e:2x4", "mixed"),
        Case("235B-A22B", "v6e:4x4", "decode"),
    ],
    ids=lambda case: f"{case.model}-{case.kind}",
)
def test_a_step_of_several_layers(case: Case) -> None:
    check(case)


def facts(layers: int, sums: int, temporaries: int) -> ProgramFacts:
    sent = Sent(
        Counter({Collective("all-reduce", 64, 4): sums, Collective("all-reduce", 8, 4): 1}), Counter()
    )
    return ProgramFacts(
        "decode", 8, 100 + 10 * layers, 50 + layers, 40 + layers, temporaries, 7 * layers, sent
    )


def test_layers_take_what_the_third_one_adds() -> None:
    whole = with_layers(facts(2, 5, 1000), facts(3, 7, 1010), 36)
    assert (whole.arguments, whole.outputs, whole.aliased) == (460, 86, 76)
    assert (whole.temporaries, whole.code) == (1000 + 34 * 10, 7 * 36)
    assert whole.sent.always == {Collective("all-reduce", 64, 4): 73, Collective("all-reduce", 8, 4): 1}


def test_layers_that_differ_are_no_measure() -> None:
    with pytest.raises(ValueError, match="a step of two layers sends what one of three does not"):
        with_layers(facts(2, 3, 0), facts(3, 2, 0), 36)
