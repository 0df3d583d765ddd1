"""`vsurge tune`: a small search by the real compiler, and one with a timer in the place of a TPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vsurge.cli import tune
from vsurge.cli.parser import build_parser
from vsurge.kernels import DecodeBlocks, paged_decode_attention
from vsurge.kernels.block_sizes import Key, device_here, read_table
from vsurge.kernels.tuning import CHIPS, Assumptions, Batch, Call, Prediction
from vsurge.kernels.tuning import search as search_module
from vsurge.kernels.tuning.candidates import candidates, workloads
from vsurge.kernels.tuning.compiler import _mesh
from vsurge.kernels.tuning.timing import time_call

KEY = Key("decode", "bfloat16", "bfloat16", 2, 1, 128, 64)
SMALL = ("tune", "--chip", "v6e", "--model", "0.6B", "--tp", "8", "--kernel", "decode", "--page-size", "64")
GOOD, WORSE, REFUSED = DecodeBlocks(256, 1, 4), DecodeBlocks(128, 1, 2), DecodeBlocks(96, 1, 4)


@pytest.fixture
def three_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "candidates", lambda *_, **__: [WORSE, GOOD, REFUSED])


@pytest.mark.usefixtures("three_candidates")
def test_the_winner_goes_into_the_table_with_what_it_was_compared_with(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "new" / "v6e.json"
    done = command(*SMALL, "--contexts", "512,128", "--out", str(table))
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == (
        "decode on v6e: 2 query and 1 KV heads, head_dim 128, bfloat16 queries, bfloat16 cache, pages of 64"
    )
    assert "predicted (1 us latency" in lines[1]
    assert lines[2].split()[-2:] == ["128", "512"]
    (refused,) = (line for line in lines if line.startswith("kv_tokens=96"))
    assert "refused: block_sizes: kv_tokens=96 must be a multiple of page_size=64" in refused
    steps = dict(line.rsplit(maxsplit=2)[0::2] for line in lines if "step" in line or "slots" in line)
    assert 100 < float(steps["bundles per step"].replace(",", "")) < 1000
    assert float(steps["KiB copied per step"]) == 128  # 256 tokens of one KV head
    assert {f"{unit} slots in use" for unit in ("matrix", "vector", "load", "store")} < set(steps)
    first, second = read_table(table)
    assert (first.key, first.more_than, first.up_to) == (KEY, 0, 128)
    assert (second.more_than, second.up_to) == (128, 512)
    assert DecodeBlocks(**second.blocks) == GOOD
    provenance = second.provenance
    assert (provenance["by"], provenance["measured_us"], provenance["tried"]) == ("predicted", None, 2)
    assert DecodeBlocks(**provenance["runner_up"]) == WORSE
    assert provenance["margin"] > 0
    assert {"jax", "libtpu", "latency_us", "copy_ns"} <= set(provenance)
    image = table.with_name("v6e-0.6b-tp8-bfloat16.png").read_bytes()
    assert image.startswith(b"\x89PNG")

    # a TPU, were it here, decides; both its times and the predicted ones are kept, in the same table
    timed = list[Call]()

    def timer(call: Call, batch: Batch) -> float:
        timed.append(call)
        return 10.0 if call.block_sizes == WORSE else 20.0

    monkeypatch.setattr(tune, "device_here", lambda: "v6e")
    monkeypatch.setattr(tune, "time_call", timer)
    done = command(*SMALL, "--contexts", "512", "--out", str(table), "--no-plot", "--json")
    document = json.loads(done.out)
    (searched,) = document["searches"]
    assert [candidate["measured_us"] for candidate in searched["candidates"]] == [
        [[10, 10]],
        [[20, 20]],
        None,
    ]
    assert {call.max_context for call in timed} == {512}
    kept, changed = read_table(table)
    assert kept == first
    assert DecodeBlocks(**changed.blocks) == WORSE
    assert (changed.provenance["by"], changed.provenance["measured_us"]) == ("measured", 10.0)
    assert changed.provenance["margin"] == 1.0
    assert changed.provenance["predicted_us"] > second.provenance["predicted_us"]


def test_mbu_and_mfu_are_of_the_measured_time_where_there_is_one() -> None:
    batch, assumed = Batch((128,) * 64), Assumptions.of("v6e")
    prediction = Prediction(
        Call(kernel="decode", num_q_heads=8, num_kv_heads=2), batch, "v6e", assumed, runs=()
    )
    predicted = search_module.Trial(GOOD, ((prediction,),))
    assert predicted.shares(0) == (prediction.mbu, prediction.mfu)
    measured = replace(predicted, measured_us=((4 * prediction.time_us,),))
    assert measured.equal_lengths_us(0) == 4 * prediction.time_us
    assert measured.shares(0) == pytest.approx((prediction.mbu / 4, prediction.mfu / 4))


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("--tp", "3"), "--tp 3: must divide the 16 query heads of 0.6B"),
        (
            ("--model", "14B", "--tp", "5"),
            "--tp 5: must divide the 8 key/value heads of 14B, or be a multiple",
        ),
        (("--contexts", "128,many"), "--contexts '128,many': must be positive numbers with commas"),
        (
            ("--contexts", "1" + "0" * 30),
            "0': must be positive numbers with commas between, like 512,2048, each",
        ),
        (("--contexts", "9" * 5000), "9': must be positive numbers with commas between"),
        (("--page-size", "0"), "--page-size 0: must be a positive multiple of 8 tokens"),
        (("--page-size", "12"), "--page-size 12: must be a positive multiple of 8 tokens"),
        (("--kv-dtype", "int9"), "--kv-dtype int9: must be one of bfloat16, float32, int8, float8_e4m3fn"),
        (("--assume", "speed=3"), "--assume speed=3: must be NAME=NUMBER with one of gbytes_per_s, tflops"),
        (("--assume", "tflops=0"), "--assume tflops=0: must be a number, above 0"),
        (("--assume", "copy_ns=-1"), "--assume copy_ns=-1: must be a number, at least 0"),
        (("--no-plot", "--plot", "x.png"), "--plot x.png: has no effect beside --no-plot"),
        (("--model", "7B"), "7B: no such folder, no hub id, and none of"),
    ],
)
def test_wrong_values_end_with_one_line(argv: tuple[str, ...], complaint: str, command: Callable) -> None:
    done = command(*SMALL, *argv)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("vsurge: error: ")
    assert complaint in done.err


def test_key_value_heads_are_repeated_where_there_are_more_devices() -> None:
    arguments = build_parser().parse_args(["tune", "--chip", "v6e", "--model", "30B-A3B", "--tp", "8"])
    assert {(call.num_q_heads, call.num_kv_heads) for call in tune.kernel_calls(arguments)} == {(4, 1)}


@pytest.mark.usefixtures("three_candidates")
def test_what_is_assumed_of_the_chip_can_be_replaced_and_is_told(command: Callable, tmp_path: Path) -> None:
    usual, slow = tmp_path / "usual.json", tmp_path / "slow.json"
    assert command(*SMALL, "--no-plot", "--contexts", "2048", "--out", str(usual)).code == 0
    others = ("--assume", "gbytes_per_s=164", "--assume", "latency_us=3", "--assume", "copy_ns=20")
    done = command(*SMALL, "--no-plot", "--contexts", "2048", "--out", str(slow), *others)
    assert "predicted (3 us latency, 20 ns per copy)" in done.out
    [before], [after] = (read_table(table) for table in (usual, slow))
    assert "gbytes_per_s" not in before.provenance
    assert after.provenance["gbytes_per_s"] == 164
    assert (after.provenance["latency_us"], after.provenance["copy_ns"]) == (3, 20)
    # At v6e's bandwidth issuing the bundles takes most; at a tenth of it the cache's bytes do.
    assert after.provenance["predicted_us"] > 2.5 * before.provenance["predicted_us"]


def test_without_matplotlib_the_extra_is_named_before_anything_is_compiled(
    command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "find_spec", lambda _: None)
    monkeypatch.setattr(tune, "start_search", lambda *_, **__: pytest.fail("it began"))
    done = command(*SMALL)
    assert done.code == 1
    assert "the roofline needs matplotlib: pip install 'vsurge[bench]', or tune with --no-plot" in done.err


@pytest.mark.parametrize("kernel", ["decode", "ragged"])
@pytest.mark.parametrize("chip", CHIPS)
def test_candidates_begin_with_the_heuristic_and_are_fewer_if_few_are_asked_for(
    kernel: Any, chip: str
) -> None:
    call = Call(kernel=kernel, num_q_heads=32, num_kv_heads=8, max_context=8192)
    every, few = candidates(call, chip), candidates(call, chip, few=True)
    assert every[0] == few[0]
    assert len(set(every)) == len(every) >= len(few) >= (2 if chip != "v4" else 1)
    assert set(few) <= set(every)


def test_workloads_fit_a_call_and_are_the_same_each_time() -> None:
    for context in (1, 128, 512, 2048, 32768):
        equal, drawn = workloads("decode", context)
        assert equal.kv_lens == (context,) * 64
        assert len(drawn.kv_lens) == 64
        assert min(128, context) <= min(drawn.kv_lens) <= max(drawn.kv_lens) <= context
        assert workloads("decode", context)[1] == drawn
        for batch in workloads("ragged", context):
            assert sum(batch.new_tokens) <= 2048
            assert all(
                new <= kv_len <= context for new, kv_len in zip(batch.new_tokens, batch.kv_lens, strict=True)
            )
    assert workloads("ragged", 32768)[0] == Batch((32768,), (2048,))


def test_chips_have_the_vector_memory_that_jax_knows_of() -> None:
    import jax
    from jax.experimental.pallas import tpu as pltpu

    assert device_here() is None
    for name, chip in CHIPS.items():
        with jax.set_mesh(_mesh(chip.topology)):
            assert device_here() == name
            assert pltpu.get_tpu_info().vmem_capacity_bytes == chip.vmem_mib * 2**20


def test_a_call_is_timed_on_the_device_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = partial(paged_decode_attention, scale=1.0, implementation="xla")
    monkeypatch.setattr(Call, "function", lambda _: attend)
    call = Call(
        kernel="decode", num_q_heads=2, num_kv_heads=1, max_seqs=2, max_context=128, query_dtype="float32",
        kv_dtype="float32",
    )  # fmt: skip
    assert time_call(call, Batch((100, 3)), repeats=3, calls=(1, 200)) > 0
