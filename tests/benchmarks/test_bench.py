"""The benchmarks: what is counted, and what is written down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

import vsurge
from vsurge.benchmarks import machine, measuring
from vsurge.benchmarks.engine.apart import Wanted, run_apart
from vsurge.benchmarks.engine.load import (
    LoadRequest,
    arriving,
    fewest_steps,
    needed_bytes,
    random_requests,
    read_requests,
    run_load,
    shortened,
)
from vsurge.benchmarks.engine.peers import transformers_engine, why_not
from vsurge.benchmarks.engine.steps import StepCase
from vsurge.benchmarks.kernels.cases import DENSE, PAGED, KernelCase, cases, gpu_paged_blocks
from vsurge.benchmarks.record import Ceilings, Report, Row, machine_slug, percentiles, read_report
from vsurge.benchmarks.report import draw, markdown
from vsurge.benchmarks.workload import Sizes, decode_bytes, prefill_operations
from vsurge.model import Model, published_config
from vsurge.runtime import vSurge

CEILINGS = Ceilings(bandwidth_gb_s=10.0, matrix_gflop_s=100.0)
MACHINE: dict[str, Any] = {
    "processor": "A Thing (avx2)", "cores": 2, "accelerator": None, "driver": None, "python": "3.11",
    "versions": {"jax": "1", "torch": None}, "commit": "abc",
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return vsurge.load_model(vsurge.demo_model_path(), dtype="float32")


@pytest.fixture(scope="module")
def some_requests(model: Model) -> list[LoadRequest]:
    return [
        replace(request, arrival_s=0.02 * i)
        for i, request in enumerate(random_requests(5, model.config.vocab_size, (4, 20), (2, 6)))
    ]


@pytest.fixture(scope="module")
def surge(model: Model, some_requests: list[LoadRequest]) -> Iterator[vSurge]:
    with measuring.engine_for(model, some_requests, 4, page_size=16) as surge:
        yield surge


def test_shares_are_of_the_median_and_of_what_was_measured() -> None:
    row = Row(suite="steps", name="decode", implementation="vSurge", seconds=(1.0, 0.5, 9.0),
        num_bytes=5 * 10**9, operations=20 * 10**9, tokens=4)  # fmt: skip
    assert row.median_s == 1.0
    assert row.mbu(CEILINGS) == pytest.approx(0.5)
    assert row.mfu(CEILINGS) == pytest.approx(0.2)
    assert row.share_of_roofline(CEILINGS) == pytest.approx(0.5)  # of the bytes, which take longer
    assert replace(row, operations=80 * 10**9).roofline_s(CEILINGS) == pytest.approx(0.8)


def test_a_report_is_read_as_it_was_written(tmp_path: Path, model: Model) -> None:
    measured = Row(suite="kernels", name="decode", implementation="xla", case={"kv": "int8", "context": 5},
        seconds=(0.25, 0.5), num_bytes=10**9, operations=10**9, tokens=8)  # fmt: skip
    missing = replace(measured, implementation="cuDNN", seconds=(), not_measured="it is not there")
    report = Report(machine=MACHINE, model="a model", ceilings=CEILINGS, rows=(measured, missing))
    report.write(tmp_path / "new" / "bench.json")
    assert read_report(tmp_path / "new" / "bench.json") == report
    text = markdown(report)
    [ours, theirs] = [line for line in text.splitlines() if line.startswith("| decode")]
    assert [cell.strip() for cell in ours.split("|")[1:-1]] == [
        "decode", "xla", "int8", "5", "375", "26.7%", "2.7%", "26.7%",
    ]  # fmt: skip
    assert [cell.strip() for cell in theirs.split("|")[5:-1]] == ["not measured", "", "", "it is not there"]
    assert "10.0 GB/s of memory, 100 GFLOP/s" in text
    (tmp_path / "other.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"other\.json: is a report of format 99, this version reads 1"):
        read_report(tmp_path / "other.json")
    for content in (b"[1]", b'{"format": 1}', b"\xff"):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.json: is no report of `vsurge bench`"):
            read_report(tmp_path / "other.json")


def test_machines_have_names_for_files() -> None:
    assert machine_slug(MACHINE) == "a-thing-avx2-2-cores"
    xeon = {"processor": "Intel(R) Xeon(R) Processor @ 2.50GHz (avx2, avx512f)"}
    assert machine_slug(MACHINE | xeon) == "intel-xeon-avx512f-2-cores"
    assert machine_slug(MACHINE | {"processor": "AMD EPYC"}) == "amd-epyc-2-cores"
    assert machine_slug(MACHINE | {"accelerator": "NVIDIA H200"}) == "nvidia-h200"


def test_percentiles_lie_between_samples() -> None:
    assert percentiles(map(float, range(101))) == (50.0, 90.0, 99.0)
    assert percentiles([]) is None


def test_requests_are_drawn_from_what_was_asked_for() -> None:
    requests = random_requests(400, 1100, (3, 5), (2, 2), seed=1)
    assert {len(request.prompt) for request in requests} == {3, 4, 5}
    assert {request.output_tokens for request in requests} == {2}
    assert {token for request in requests for token in request.prompt} == set(range(100))
    assert random_requests(5, 1100, (3, 5), (1, 9), seed=1) != random_requests(
        5, 1100, (3, 5), (1, 9), seed=2
    )


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps of the mean that was asked for, whose standard deviation is their mean; the same of a seed."""
    requests = [LoadRequest([1], 1)] * 4001
    times = [request.arrival_s for request in arriving(requests, 4.0, seed=3)]
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)
    assert times == [request.arrival_s for request in arriving(requests, 4.0, seed=3)]


def test_lengths_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"input_tokens": 3, "output_tokens": 7}\n\n{"input_tokens": 1, "output_tokens": 2}\n')
    requests = read_requests(path, 2000)
    assert [(len(request.prompt), request.output_tokens) for request in requests] == [(3, 7), (1, 2)]
    for text, message in (
        ('{"input_tokens": 3}', r"requests\.jsonl:1: must be like .* got '{\"input_tokens\": 3}'"),
        ('{"input_tokens": 0, "output_tokens": 1}', r":1: input_tokens and output_tokens must be at least 1"),
        ("\n", "holds no requests"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_requests(path, 2000)


def test_bytes_are_weights_for_each_step_and_what_each_token_sees(model: Model) -> None:
    """A prompt of 3 and 2 tokens of output: its steps see 3 and 4 tokens."""
    sizes = Sizes(weights=1000, token=10)
    requests = [LoadRequest([1, 2, 3], 2), LoadRequest([1], 1)]
    assert needed_bytes(sizes, requests, 5) == 5 * 1000 + (3 + 4 + 1) * 10
    assert fewest_steps(requests, 2) == 2
    assert fewest_steps([LoadRequest([1], 3)] * 5, 2) == 8
    config = model.config
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4  # in float32
    assert Sizes.of(model) == Sizes(2 * decode_bytes(config, 1, 0), cache)
    assert Sizes.in_bfloat16(config).token == cache // 2


def test_operations_of_requests_are_those_of_their_steps() -> None:
    """A step for the prompt and one for each token behind the first: with these prefixes they add up."""
    config = published_config("0.6B")
    request = LoadRequest(list(range(50)), 4)
    steps = [StepCase("prefill", 1, 50), *(StepCase("decode", 1, 50 + n) for n in (1, 2, 3))]
    assert sum(step.operations(config) for step in steps) == measuring.operations_of(config, [request])
    assert StepCase("prefill", 1, 50).operations(config) == prefill_operations(config, 50)


def test_a_load_tells_how_every_request_fared(
    surge: vSurge, model: Model, some_requests: list[LoadRequest]
) -> None:
    requests = some_requests
    load = run_load(surge, requests, requests_per_s=50.0)
    outputs = [request.output_tokens for request in requests]
    assert (load.num_requests, load.output_tokens) == (5, sum(outputs))
    assert load.input_tokens == sum(len(request.prompt) for request in requests)
    assert len(load.ttft_s) == len(load.e2e_s) == 5
    assert len(load.token_gaps_s) == sum(outputs) - 5
    assert all(0 < first <= whole for first, whole in zip(load.ttft_s, load.e2e_s, strict=True))
    assert sum(load.e2e_s) == pytest.approx(sum(load.ttft_s) + sum(load.token_gaps_s))
    assert load.seconds >= max(load.e2e_s)
    assert max(outputs) <= load.num_steps <= sum(outputs) + 5
    assert load.num_bytes == needed_bytes(Sizes.of(model), requests, load.num_steps)


def test_a_load_has_the_share_of_the_work_in_which_the_device_idled(
    surge: vSurge, some_requests: list[LoadRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = replace(surge.metrics, work_seconds=10.0, device_idle_seconds=3.0)
    after = replace(before, num_steps=before.num_steps + 2, work_seconds=18.0, device_idle_seconds=4.0)
    snapshots = iter([before, after])
    monkeypatch.setattr(type(surge), "metrics", property(lambda _: next(snapshots)))
    load = run_load(surge, some_requests[:1], requests_per_s=None)
    assert (load.idle_share, load.num_steps) == (0.125, 2)
    older = replace(load, idle_share=None)  # of a report that does not say
    text = markdown(Report(machine=MACHINE, model="m", ceilings=CEILINGS, loads=(load, older)))
    [*_, first, second] = [line.split("|")[-2].strip() for line in text.splitlines() if "all at once" in line]
    assert (first, second) == ("12.5%", "")


def test_warming_up_makes_no_request_longer() -> None:
    requests = [LoadRequest([1, 2], 9), LoadRequest([3], 1)]
    assert shortened(requests) == [LoadRequest([1, 2], 4), LoadRequest([3], 1)]


def test_transformers_takes_the_same_requests(model: Model) -> None:
    requests = random_requests(3, model.config.vocab_size, (4, 9), (2, 3))
    assert transformers_engine(model.config, 2, 32, "cpu")(requests) > 0
    assert why_not("transformers", "cpu") is None
    assert why_not("transformers", "tpu") == "is not run on a TPU here"


def test_a_peer_in_a_process_of_its_own_says_why_it_fails(model: Model) -> None:
    with pytest.raises(RuntimeError, match="ModuleNotFoundError: No module named 'vllm'"):
        run_apart(Wanted("vLLM", model.config, [LoadRequest([1, 2], 2)], 1, "cpu"))


@pytest.mark.slow
def test_a_peer_in_a_process_of_its_own_takes_the_same_requests(model: Model) -> None:
    assert run_apart(Wanted("transformers", model.config, [LoadRequest([1, 2], 2)], 1, "cpu")) > 0


def test_a_sample_on_an_accelerator_is_the_difference_of_many_runs_and_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a clock on which a run takes 1 ms, and whatever is waited for 5 ms besides."""
    now = [0.0]

    def run() -> None:
        now[0] += 0.001

    def wait(_: Any) -> None:
        now[0] += 0.005

    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(jax, "block_until_ready", wait)
    assert machine.device_seconds_of(run, repeats=3) == pytest.approx([0.001] * 3)
    before = now[0]
    machine.device_seconds_of(run, repeats=1)
    assert now[0] - before > 0.01  # what a sample takes
    monkeypatch.setattr(measuring, "platform", lambda: "gpu")
    assert measuring.samples_of(run, calls=4) == pytest.approx([0.00025] * measuring.SAMPLES)


def test_a_report_has_the_rate_of_reading_and_that_of_copying(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        measuring,
        "measure_ceilings",
        lambda: {"bandwidth_gb_s": 3.0, "copy_gb_s": 4.0, "matrix_gflop_s": 5.0},
    )
    found = measuring.ceilings()
    assert found == Ceilings(4.0, 5.0, read_gb_s=3.0, copy_gb_s=4.0)
    report = Report(machine=MACHINE, model=None, ceilings=replace(found, bandwidth_gb_s=5.0))
    assert (
        "5.0 GB/s of memory (read 3.0, copied 4.0: a share of the copy's bandwidth is MBU times 1.250)"
        in markdown(report)
    )


def small(case: KernelCase, **changes: Any) -> KernelCase:
    return replace(case, num_seqs=min(case.num_seqs, 2), context=128, new_tokens=min(case.new_tokens, 128),
        num_q_heads=4, num_kv_heads=2, head_dim=64, **changes)  # fmt: skip


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_implementations_are_given_the_same_problem(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of queries at random and caches of zeros: as many outputs, of the same shape, and all of them zero."""
    monkeypatch.setattr(KernelCase, "num_calls", lambda *_: 2)
    some = [
        small(case, page_size=64)
        for case in cases("cpu", (4, 2))
        if case.kernel == kernel and case.new_tokens in (1, case.context)
    ]
    assert {case.implementation for case in some} == {"xla", DENSE["cpu"]}
    for case in some:
        with jax.numpy_dtype_promotion("standard"):  # which jax's own attention needs
            outputs = jax.tree.map(np.asarray, case.build("cpu")())
        assert len(outputs) == 2
        assert all(output.size == case.num_seqs * case.new_tokens * 4 * 64 for output in outputs)
        assert all(not output.any() for output in outputs)


def test_cases_count_what_they_cannot_do_without() -> None:
    decode = KernelCase(
        kernel="decode", implementation="xla", num_q_heads=8, num_kv_heads=2, num_seqs=3, context=100
    )
    assert decode.num_bytes == 3 * 100 * 2 * 2 * 128 * 2
    assert decode.operations == 3 * 100 * 4 * 8 * 128
    prefill = replace(decode, kernel="prefill", num_seqs=1, new_tokens=4, context=10)
    assert prefill.operations == (7 + 8 + 9 + 10) * 4 * 8 * 128
    append = replace(decode, kernel="append", num_seqs=1, new_tokens=4, kv_dtype="int8")
    assert append.num_bytes == 4 * 2 * 2 * (128 + 4)  # a float32 scale for each row
    skewed = replace(decode, skewed=True, num_seqs=500, context=2048)
    assert (min(skewed.lengths) >= 32, max(skewed.lengths) <= 2048) == (True, True)
    assert np.log(skewed.lengths).mean() == pytest.approx(np.log([32, 2048]).mean(), rel=0.03)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_platform_has_cases_of_ours_and_of_jax(platform: str) -> None:
    found = list(cases(platform, (16, 8)))
    assert len(found) == len(set(found))
    assert {case.kernel for case in found} == {"decode", "prefill", "append"}
    theirs = {DENSE[platform]} if platform == "cpu" else {DENSE[platform], PAGED}
    ours = {"cpu": {"xla"}, "gpu": {"xla", "triton"}, "tpu": {"xla", "mosaic_tpu"}}[platform]
    for kernel, names in (("decode", ours | theirs), ("prefill", ours | {DENSE[platform]}), ("append", ours)):
        assert {case.implementation for case in found if case.kernel == kernel} == names
    everything = set(cases(platform, (16, 8), thorough=True))
    assert set(found) < everything
    assert {case.page_size for case in everything} == {16, 64, 128}


def test_jax_takes_the_blocks_that_its_paged_attention_is_given() -> None:
    """All cases, for which its defaults are too many where sequences have few pages."""
    for case in cases("gpu", (32, 8), thorough=True):
        if case.implementation != PAGED:
            continue
        pages_per_seq = -(-case.context // case.page_size)
        splits, block = gpu_paged_blocks(pages_per_seq)
        pages = jax.ShapeDtypeStruct((8, 2 * pages_per_seq, case.page_size, 128), "bfloat16")
        jax.eval_shape(
            partial(paged_attention, k_splits=splits, pages_per_compute_block=block),
            jax.ShapeDtypeStruct((2, 32, 128), "bfloat16"), pages, pages,
            jax.ShapeDtypeStruct((2, pages_per_seq), "int32"), jax.ShapeDtypeStruct((2,), "int32"),
        )  # fmt: skip
    assert (gpu_paged_blocks(8), gpu_paged_blocks(1024)) == ((8, 1), (16, 8))


@pytest.mark.parametrize(("platform", "filled"), [("cpu", False), ("gpu", True)])
def test_prompts_find_random_numbers_in_the_cache_where_matrix_units_bound_them(
    platform: str, filled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KernelCase, "num_calls", lambda *_: 1)
    case = small(next(case for case in cases("cpu", (4, 2)) if case.kernel == "prefill"), page_size=64)
    for implementation in ("xla", DENSE["cpu"]):
        with jax.numpy_dtype_promotion("standard"):
            output = jax.tree.leaves(replace(case, implementation=implementation).build(platform)())[0]
        assert np.asarray(output, np.float32).any() == filled


def test_rows_say_which_attention_ran_and_with_which_block_sizes() -> None:
    config = published_config("8B")
    assert StepCase("decode", 1, 128).attention(config) == "xla"
    kernels = replace(config, attention="triton", decode_attention="triton")
    decode = "kv_tokens=64 programs=528 num_warps=4 num_stages=3"
    assert StepCase("decode", 1, 128).attention(kernels) == f"triton {decode}"
    assert StepCase("prefill", 1, 128).attention(kernels).startswith("triton rows=128 kv_tokens=64 ")
    found = {case.case.get("blocks") for case in cases("gpu", (32, 8)) if case.kernel == "decode"}
    assert found == {None, decode}  # of Triton's alone


def test_what_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(cases("cpu", (4, 2)))
    good, bad = small(case, page_size=64), small(case, page_size=64, kv_dtype="int4")
    monkeypatch.setattr(measuring.kernels, "cases", lambda *_: [good, bad])
    monkeypatch.setattr(KernelCase, "num_calls", lambda *_: 1)
    fine, refused = measuring.kernel_rows(published_config("0.6B"), show_progress=False)
    assert len(fine.seconds) >= 3
    assert fine.not_measured is None
    assert refused.seconds == ()
    assert "int4" in str(refused.not_measured)


def test_pictures_are_drawn_of_what_was_measured(
    tmp_path: Path, surge: vSurge, some_requests: list[LoadRequest]
) -> None:
    loads = measuring.load_rows(surge, some_requests[:2], [50.0, 100.0], show_progress=False)
    decode = Row(suite="kernels", name="decode", implementation="xla", num_bytes=10**6, operations=10**6,
        seconds=(0.1,), case={"kv": "int8", "page": 16, "sequences": 2, "context": 64})  # fmt: skip
    engine = replace(decode, suite="engine", case={"requests": 2}, tokens=4)
    report = Report(machine=MACHINE, model="m", ceilings=CEILINGS, rows=(decode, engine), loads=tuple(loads))
    written = draw(report, tmp_path)
    assert [path.name for path in written] == ["roofline.png", "mbu.png", "engines.png", "load.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    nothing = replace(decode, seconds=(), not_measured="no")
    assert draw(replace(report, rows=(nothing,), loads=()), tmp_path) == []
