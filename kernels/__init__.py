"""Attention kernels over a paged key/value cache, and the cache itself.

Usable on their own: nothing here knows of models or engines.
"""

from .append import append_kv
from .decode import DecodeBlocks, TritonDecodeBlocks, paged_decode_attention
from .dispatch import Implementation
from .kv_pages import SUPPORTED_DTYPES, KVPages, bytes_per_token, empty_kv_pages, read_kv
from .ragged import RaggedBlocks, TritonRaggedBlocks, ragged_paged_attention

__all__ = [
    "SUPPORTED_DTYPES",
    "DecodeBlocks",
    "Implementation",
    "KVPages",
    "RaggedBlocks",
    "TritonDecodeBlocks",
    "TritonRaggedBlocks",
    "append_kv",
    "bytes_per_token",
    "empty_kv_pages",
    "paged_decode_attention",
    "ragged_paged_attention",
    "read_kv",
]
