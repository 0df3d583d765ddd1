"""Block sizes of the attention kernels for GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from ..block_sizes import Key, tuned_blocks

LEAST = 16  # of a matrix product's sizes, as Triton has them
MOST_WARPS = 32  # of a thread block: 1,024 threads


@dataclass(frozen=True)
class TritonDecodeBlocks:
    """How `paged_decode_attention` cuts its work on a GPU.

    Attributes:
        kv_tokens: that a program visits at once; a power of two of at least 16.
        programs: parts of the batch's context times KV heads to aim for. The default is four for each of an
            H100's 132 multiprocessors.
        num_warps: of a program, 32 threads each; a power of two of at most 32.
        num_stages: of the software pipeline that copies what is visited next; at least 1.
    """

    kv_tokens: int = 64
    programs: int = 528
    num_warps: int = 4
    num_stages: int = 3

    def check(self) -> None:
        """Raises ValueError for sizes that no kernel can have, with the value and what is allowed."""
        if self.programs < 1:
            raise ValueError(f"block_sizes: programs={self.programs} must be at least 1")
        _check(self)


@dataclass(frozen=True)
class TritonRaggedBlocks:
    """How `ragged_paged_attention` cuts its work on a GPU.

    Attributes:
        rows: of queries in a program, the query heads of a KV head times tokens; a power of two of at least
            16.
        kv_tokens, num_warps, num_stages: as of `TritonDecodeBlocks`.
    """

    rows: int = 128
    kv_tokens: int = 64
    num_warps: int = 8
    num_stages: int = 3

    def check(self) -> None:
        """Raises ValueError for sizes that no kernel can have, with the value and what is allowed."""
        _check_power("rows", self.rows, LEAST)
        _check(self)


DECODE, RAGGED = TritonDecodeBlocks(), TritonRaggedBlocks()  # where nothing was tuned


def chosen_decode_blocks(key: Key, context: int) -> TritonDecodeBlocks:
    """The block sizes that the tables hold for a call, else the default ones; see `tuned_blocks`."""
    check = TritonDecodeBlocks.check
    return tuned_blocks(key, context, TritonDecodeBlocks, check, "triton") or DECODE


def chosen_ragged_blocks(key: Key, context: int) -> TritonRaggedBlocks:
    """As `chosen_decode_blocks`."""
    check = TritonRaggedBlocks.check
    return tuned_blocks(key, context, TritonRaggedBlocks, check, "triton") or RAGGED


def _check(blocks: TritonDecodeBlocks | TritonRaggedBlocks) -> None:
    _check_power("kv_tokens", blocks.kv_tokens, LEAST)
    _check_power("num_warps", blocks.num_warps, 1)
    if blocks.num_warps > MOST_WARPS:
        raise ValueError(f"block_sizes: num_warps={blocks.num_warps} must be at most {MOST_WARPS}")
    if blocks.num_stages < 1:
        raise ValueError(f"block_sizes: num_stages={blocks.num_stages} must be at least 1")


def _check_power(name: str, value: int, least: int) -> None:
    if value < least or value & (value - 1):
        raise ValueError(f"block_sizes: {name}={value} must be a power of two of at least {least}")
