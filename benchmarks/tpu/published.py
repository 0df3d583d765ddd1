"""Published timings of kernels on TPUs, and what is predicted of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from ...kernels.tuning import Batch, Call, Compilers, Prediction
from .rows import Row


@dataclass(frozen=True)
class Timing:
    """A measurement that others published, with chip, shapes and block sizes.

    Attributes:
        source: where.
        chip, call, batch: what was timed.
        measured_us: of the whole jitted call, on the device.
    """

    source: str
    chip: str
    call: Call
    batch: Batch
    measured_us: float


MATCHED = (
    Timing(
        "github.com/aryatschand/JAXBench (benchmark/results.csv at 999e01e; jax 0.6.2, device profiler)",
        "v6e",
        Call(
            kernel="jax_ragged", num_q_heads=64, num_kv_heads=8, page_size=16, max_seqs=64, max_context=4096,
            max_tokens=4096, block_sizes=(32, 64),
        ),
        Batch((4096,) * 64, (64,) * 64),
        2982.9,
    ),
)  # fmt: skip

# Others leave out what a prediction needs, or time a kernel that is neither ours nor jax's.
NOT_MATCHED = (
    "arXiv 2604.15464 (7x, Llama-3-8B, up to 86 % MBU and 73 % MFU): RPA v3, a kernel that is not here",
    "sgl-project/sglang-jax pull 1647 (7x, 83.7 us for 2,048 new tokens): RPA v3, heads not given",
    "sgl-project/sglang-jax issue 967 (v2 0.917 ms prefill, 0.323 ms decode): neither chip nor shapes given",
    "sgl-project/sglang-jax pull 1492 (1.658 to 0.398 ms, 32 sequences of 4 queries at 16k, 16 query heads "
    "and 1 KV head of 256): RPA v3 before and after a change; neither chip nor block sizes given",
    "vllm-project/tpu-inference pull 3102 (7x, 49 % more throughput by decode blocks of 4,096 for 16,384): "
    "RPA v3, and of an engine, without a kernel's time",
    "vllm-project/tpu-inference pull 3607 (4.6x from larger blocks): another kernel",
)


def published_rows(chip: str, compilers: Compilers) -> Iterator[Row]:
    """What is predicted over what was measured, of the timings on a chip."""
    pending: list[tuple[Timing, Future[list[Prediction]]]] = [
        (timing, compilers.predict(timing.call, [timing.batch], chip))
        for timing in MATCHED
        if timing.chip == chip
    ]
    for timing, future in pending:
        predicted = future.result()[0].time_us
        yield Row(
            chip,
            f"jax's kernel, predicted over the {timing.measured_us:,.1f} us that {timing.source} measured",
            "x",
            None,
            predicted / timing.measured_us,
            raw={"predicted_us": predicted, "measured_us": timing.measured_us},
        )
