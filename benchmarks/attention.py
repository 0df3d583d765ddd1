"""Which implementation of attention runs, and with which block sizes, for what is written down of it."""

from __future__ import annotations

from dataclasses import asdict

from ..kernels import decode, ragged
from ..kernels.block_sizes import Key
from ..kernels.block_sizes.table import TunedKernel
from ..kernels.dispatch import Implementation, choose_implementation
from ..kernels.gpu.blocks import chosen_decode_blocks, chosen_ragged_blocks
from ..model import Qwen3Config


def attention_of(config: Qwen3Config, kernel: TunedKernel, *, page_size: int, context: int) -> str:
    """That of a model on one device, like "triton kv_tokens=64 programs=528 num_warps=4 num_stages=3".

    Block sizes are those of Triton's kernels alone.

    Args:
        config: the model's.
        kernel: "decode" or "ragged".
        page_size: of its cache.
        context: tokens of the longest sequence that there is room for.
    """
    of_decode = kernel == "decode"
    asked, room = (config.decode_attention, decode) if of_decode else (config.attention, ragged)
    dtypes = config.dtype.name, (config.kv_dtype or config.dtype).name
    key = Key(kernel, *dtypes, config.num_q_heads, config.num_kv_heads, config.head_dim, page_size)
    room_for = -(-context // page_size) * page_size
    name = "paged_decode_attention" if of_decode else "ragged_paged_attention"
    chosen = choose_implementation(name, asked, room.IMPLEMENTATIONS, tuned=(key, room_for))
    return f"{chosen} {blocks_of(chosen, key, room_for)}".rstrip()


def blocks_of(implementation: Implementation | str, key: Key, context: int) -> str:
    """The block sizes of one of Triton's kernels, like "kv_tokens=64 programs=528"; nothing of others."""
    if implementation != "triton":
        return ""
    choose = chosen_decode_blocks if key.kernel == "decode" else chosen_ragged_blocks
    return " ".join(f"{name}={value}" for name, value in asdict(choose(key, context)).items())
