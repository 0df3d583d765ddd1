"""`vsurge tune` for a GPU, with a timer in the place of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vsurge.cli import tune_gpu
from vsurge.kernels import TritonDecodeBlocks, TritonRaggedBlocks
from vsurge.kernels.block_sizes import Key, read_table
from vsurge.kernels.tuning import Batch, Call

DECODE = Key("decode", "bfloat16", "bfloat16", 2, 1, 128, 128)
GPU = ("tune", "--chip", "nvidia-test", "--model", "0.6B", "--tp", "8", "--contexts", "512,128", "--few")
WIDE = TritonDecodeBlocks(programs=1056)


def timer(call: Call, batch: Batch) -> float:
    """Triton with more programs wins at short contexts, XLA at long ones; of prompts XLA has no memory."""
    if call.implementation == "xla":
        if call.kernel == "ragged":
            raise RuntimeError("RESOURCE_EXHAUSTED: out of\nmemory")
        return 50.0
    if call.block_sizes == TritonRaggedBlocks(rows=64):
        return 30.0
    return (20.0 if call.block_sizes == WIDE else 40.0) * max(batch.kv_lens) / 128


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_gpu, "device_here", lambda: "nvidia-test")
    monkeypatch.setattr(tune_gpu, "time_call", timer)
    rates = {"bandwidth_gb_s": 3900.0, "copy_gb_s": 4000.0, "matrix_gflop_s": 500e3}
    monkeypatch.setattr(tune_gpu, "measure_ceilings", lambda: rates)


@pytest.mark.usefixtures("here")
def test_the_fastest_of_each_context_goes_into_the_table(command: Callable, tmp_path: Path) -> None:
    table = tmp_path / "new.json"
    done = command(*GPU, "--out", str(table))
    assert done.code == 0, done.err
    short, long, *prompts = read_table(table)
    assert (short.key, short.more_than, short.up_to) == (DECODE, 0, 128)
    assert (short.implementation, TritonDecodeBlocks(**short.blocks)) == ("triton", WIDE)
    assert (long.more_than, long.up_to, long.implementation, long.blocks) == (128, 512, "xla", {})
    assert {(entry.implementation, entry.blocks["rows"]) for entry in prompts} == {("triton", 64)}
    provenance = short.provenance
    assert (provenance["by"], provenance["measured_us"], provenance["margin"]) == ("measured", 20.0, 1.0)
    assert provenance["runner_up"].startswith("triton kv_tokens=64 programs=528 ")
    assert (provenance["gbytes_per_s"], provenance["tflops"]) == (4000.0, 500.0)
    assert long.provenance["runner_up"].startswith("triton kv_tokens=64 programs=1056 ")

    lines = done.out.splitlines()
    (xla, refused, why) = (line for line in lines if line.startswith("xla"))
    assert xla.split() == ["xla", "50.0", "50.0*"]
    assert refused.split() == ["xla", "refused", "refused"]
    assert why == "xla: refused: RESOURCE_EXHAUSTED: out of memory"
    (mbu, _) = (line for line in lines if line.startswith("MBU of the winner"))
    read = 64 * 128 * 2 * 128 * 2  # sequences, tokens, keys and values of 128 numbers of two bytes
    assert mbu.split()[-2] == f"{read / 20e-6 / 4000e9:.1%}"
    assert "of 4,000.0 GB/s and 500.0 TFLOP/s, measured in this run" in lines
    assert lines[-1] == f"written to {table}"


@pytest.mark.usefixtures("here")
def test_a_context_that_is_refused_leaves_a_candidate_the_others(
    command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """XLA is the fastest as far as it has memory; where nothing has, the table says nothing."""

    def time_call(call: Call, batch: Batch) -> float:
        if call.max_context > (128 if call.implementation == "xla" else 512):
            raise RuntimeError("out of memory")
        return 1.0 if call.implementation == "xla" else 2.0

    monkeypatch.setattr(tune_gpu, "time_call", time_call)
    table = tmp_path / "new.json"
    done = command(*GPU[:-2], "128,512,2048", "--few", "--kernel", "decode", "--out", str(table))
    assert done.code == 0, done.err
    assert [(entry.up_to, entry.implementation) for entry in read_table(table)] == [
        (128, "xla"), (512, "triton"),
    ]  # fmt: skip
    lines = done.out.splitlines()
    assert ["xla", "1.0*", "refused", "refused"] in [line.split() for line in lines]
    assert "xla: refused: out of memory" in lines


@pytest.mark.usefixtures("here")
def test_a_kernel_that_is_tuned_is_in_the_table_whatever_becomes_of_the_next(
    command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def time_call(call: Call, batch: Batch) -> float:
        if call.kernel == "ragged":
            raise ZeroDivisionError
        return timer(call, batch)

    monkeypatch.setattr(tune_gpu, "time_call", time_call)
    table = tmp_path / "new.json"
    with pytest.raises(ZeroDivisionError):
        command(*GPU, "--out", str(table))
    assert {entry.key.kernel for entry in read_table(table)} == {"decode"}


@pytest.mark.usefixtures("here")
def test_every_candidate_is_in_the_json(command: Callable, tmp_path: Path) -> None:
    done = command(*GPU, "--kernel", "decode", "--json", "--out", str(tmp_path / "new.json"))
    (search,) = json.loads(done.out)["searches"]
    xla, default, *others = search["candidates"]
    assert (xla["implementation"], xla["blocks"]) == ("xla", {})
    assert [len(times) for times in xla["measured_us"]] == [2, 2]
    assert TritonDecodeBlocks(**default["blocks"]) == TritonDecodeBlocks()
    assert others
    assert [entry["implementation"] for entry in search["entries"]] == ["triton", "xla"]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (
            ("--chip", "v3"),
            "--chip v3: must be one of v4, v5e, v5p, v6e, 7x, which need not be here, or the GPU",
        ),
        (("--chip", "nvidia-h999"), "that is, to be timed; the device here is 'nvidia-test'"),
        (("--assume", "tflops=1"), "--assume: is of predictions for TPUs"),
        (("--plot", "x.png"), "--plot: is of predictions for TPUs"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_is_not_for_a_gpu_is_refused(argv: tuple[str, ...], complaint: str, command: Callable) -> None:
    done = command(*GPU, *argv)
    assert (done.code, done.out) == (1, "")
    assert complaint in done.err


def test_a_gpu_that_is_not_here_cannot_be_timed(command: Callable) -> None:
    done = command(*GPU)
    assert done.code == 1
    assert "--chip nvidia-test: must be one of" in done.err
    assert "there is none here" in done.err
