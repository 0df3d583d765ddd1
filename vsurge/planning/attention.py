"""The attention kernels' part in a step: predicted from the compiler's schedule (`kernels.tuning`)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from ..kernels.tuning import Assumptions, Batch, Call, Compilers, Prediction
from .deployment import Deployment
from .timing import Attention


@dataclass(frozen=True)
class Pending:
    """Predictions that are being made, of one layer of a device.

    Attributes:
        num_layers: to multiply by.
        predictions: per batch; of one kernel, or of several that follow one another.
    """

    num_layers: int
    predictions: tuple[Future[list[Prediction]], ...]

    def result(self) -> list[Attention]:
        """Of each batch. Raises as `Compilers.predict`."""
        kernels = [future.result() for future in self.predictions]
        return [self._sum(runs) for runs in zip(*kernels, strict=True)]

    def _sum(self, runs: Sequence[Prediction]) -> Attention:
        seen = [run for run in runs if run.call.kernel != "append"]
        return Attention(
            time_us=self.num_layers * sum(run.time_us for run in runs),
            useful_bytes=float(self.num_layers * sum(run.call.useful_bytes(run.batch) for run in seen)),
            useful_flops=float(self.num_layers * sum(run.call.useful_flops(run.batch) for run in seen)),
        )


def shard_call(
    deployment: Deployment,
    kernel: str,
    *,
    page_size: int,
    max_seqs: int,
    max_context: int,
    max_tokens: int = 1,
) -> Call:
    """A kernel call of one device: with its heads alone."""
    config, layout = deployment.config, deployment.layout
    return Call(
        kernel=kernel,  # pyright: ignore[reportArgumentType]
        num_q_heads=config.num_q_heads // layout.size("q_heads"),
        num_kv_heads=config.num_kv_heads // layout.size("kv_heads"),
        head_dim=config.head_dim,
        page_size=page_size,
        query_dtype=str(config.dtype),
        kv_dtype=str(config.cache_dtype),
        max_seqs=max_seqs,
        max_context=max_context,
        max_tokens=max_tokens,
    )


def predict_decode(
    deployment: Deployment,
    batches: Sequence[tuple[int, int]],
    compilers: Compilers,
    assumptions: Assumptions,
    *,
    page_size: int,
    max_context: int,
) -> Pending:
    """Of decode steps of (sequences, tokens of each); the program is that of the largest batch."""
    call = shard_call(
        deployment,
        "decode",
        page_size=page_size,
        max_seqs=max(batch for batch, _ in batches),
        max_context=max_context,
    )
    lengths = [Batch(kv_lens=(context,) * batch) for batch, context in batches]
    future = compilers.predict(call, lengths, deployment.slice.chip, [assumptions])
    return Pending(deployment.config.num_layers, (future,))


def predict_prefill(
    deployment: Deployment,
    contexts: Sequence[int],
    compilers: Compilers,
    assumptions: Assumptions,
    *,
    page_size: int,
    max_seqs: int,
    max_context: int,
    chunk: int,
) -> Pending:
    """Of the steps with the average chunk of a prompt of so many tokens: attention grows evenly along it."""
    sizes = [min(chunk, context) for context in contexts]
    batches = [
        Batch(kv_lens=((context + size) // 2,), q_lens=(size,))
        for context, size in zip(contexts, sizes, strict=True)
    ]
    calls = [
        shard_call(
            deployment,
            kernel,
            page_size=page_size,
            max_seqs=max_seqs,
            max_context=max_context,
            max_tokens=chunk,
        )
        for kernel in ("append", "ragged")
    ]
    futures = [compilers.predict(call, batches, deployment.slice.chip, [assumptions]) for call in calls]
    return Pending(deployment.config.num_layers, tuple(futures))
