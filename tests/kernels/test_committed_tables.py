"""The committed tables of block sizes: complete, and every entry is what the kernel then takes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from vsurge.benchmarks.tpu import tables
from vsurge.kernels import DecodeBlocks, RaggedBlocks
from vsurge.kernels.block_sizes import Entry, read_table, table_path
from vsurge.kernels.block_sizes.table import TunedKernel
from vsurge.kernels.tuning import CHIPS, Call
from vsurge.kernels.tuning.candidates import chosen_decode_blocks, chosen_ragged_blocks

TUNED: dict[TunedKernel, tuple[str, ...]] = {
    "decode": ("v5e", "v5p", "v6e", "7x"),
    "ragged": ("v5e", "v5p", "v6e", "7x"),
}
# Query and KV heads of every Qwen3 and of its shards.
HEADS = {
    (16, 8), (8, 4), (4, 2), (2, 1), (32, 8), (16, 4), (8, 2), (4, 1), (64, 8), (32, 4), (16, 2), (8, 1),
    (40, 8), (20, 4), (10, 2), (5, 1), (64, 4), (32, 2), (16, 1),
}  # fmt: skip
RANGES: dict[TunedKernel, list[tuple[int, int]]] = {
    "decode": [(0, 128), (128, 512), (512, 2048), (2048, 8192)],
    "ragged": [(0, 512), (512, 2048), (2048, 8192)],
}


@pytest.fixture(autouse=True)
def no_table_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VSURGE_HOME", str(tmp_path))


def of_call(entry: Entry) -> Call:
    """The call with the longest context of an entry's range."""
    key = entry.key
    return Call(
        kernel=key.kernel,
        num_q_heads=key.num_q_heads,
        num_kv_heads=key.num_kv_heads,
        head_dim=key.head_dim,
        page_size=key.page_size,
        query_dtype=key.query_dtype,
        kv_dtype=key.kv_dtype,
        max_context=entry.up_to,
    )


@pytest.mark.parametrize(
    ("chip", "kernel"), [(chip, kernel) for kernel, chips in TUNED.items() for chip in chips]
)
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_a_chips_table_holds_every_shard_and_every_context(
    chip: str, kernel: TunedKernel, page_size: int
) -> None:
    found = [
        entry
        for entry in read_table(table_path(chip))
        if entry.key.kernel == kernel and entry.key.page_size == page_size and entry.key.head_dim == 128
        if entry.key.query_dtype == entry.key.kv_dtype == "bfloat16"
    ]
    for heads in HEADS:
        own = [entry for entry in found if (entry.key.num_q_heads, entry.key.num_kv_heads) == heads]
        assert sorted((entry.more_than, entry.up_to) for entry in own) == RANGES[kernel], heads
    assert set(tables.all_heads()) == HEADS


@pytest.mark.parametrize("chip", TUNED["decode"])
def test_every_entry_fits_the_kernel_that_takes_it_and_says_where_it_comes_from(
    chip: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One that does not fit would be passed over with a warning, and one without a match logged."""
    with caplog.at_level(logging.INFO, "vsurge.kernels"):
        for entry in read_table(table_path(chip)):
            call = of_call(entry)
            if entry.key.kernel == "decode":
                assert chosen_decode_blocks(call, chip) == DecodeBlocks(**entry.blocks)
            else:
                assert chosen_ragged_blocks(call, chip) == RaggedBlocks(**entry.blocks)
            assert {"by", "jax", "libtpu", "margin"} <= set(entry.provenance)
            assert entry.provenance["margin"] >= 0
            json.dumps(dict(entry.provenance))
    assert caplog.records == []


def test_no_other_chip_has_a_table() -> None:
    assert [chip for chip in CHIPS if table_path(chip).exists()] == ["v5e", "v5p", "v6e", "7x"]
