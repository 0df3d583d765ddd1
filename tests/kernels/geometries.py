"""The heads of Qwen3 on one device: of every published model, and of its shards."""

from __future__ import annotations

from vsurge.model import PUBLISHED

MIXTURES = ((32, 4), (64, 4))  # query and KV heads of the models of experts, 30B and 235B
SHARDS = (1, 2, 4, 8)  # devices that share the heads


def shares(num_q_heads: int, num_kv_heads: int) -> list[tuple[int, int]]:
    """What each device has: where there are fewer KV heads than devices, one of them that others have too."""
    return [(num_q_heads // n, max(1, num_kv_heads // n)) for n in SHARDS]


MODELS = (*sorted({(config.num_q_heads, config.num_kv_heads) for config in PUBLISHED.values()}), *MIXTURES)
HEADS = sorted({heads for model in MODELS for heads in shares(*model)})
