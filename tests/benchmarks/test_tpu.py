"""The report on the TPU kernels and the maker of tables, without compiling anything."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from vsurge.benchmarks.tpu import decode, tables
from vsurge.benchmarks.tpu.rows import Row, table
from vsurge.kernels import DecodeBlocks
from vsurge.kernels.block_sizes import Entry
from vsurge.kernels.tuning import Call


def test_a_row_tells_whether_its_target_is_met() -> None:
    row = Row("v6e", "share", "%", 0.9, at_least=0.9)
    assert row.met
    assert not replace(row, ours=0.89).met
    assert replace(row, ours=None).met is None
    assert replace(row, at_least=None).met is None
    assert not replace(row, at_least=None, at_most=0.5).met
    lines = table([row, Row("7x", "ratio", "x", 1.234567, 2.0, at_most=1.1)])
    assert lines[0] == "| chip | figure | ours | jax's | target |  |"
    assert lines[2] == "| v6e | share | 90.0% |  | ≥ 90.0% | met |"
    assert lines[3] == "| 7x | ratio | 1.235 x | 2 x | ≤ 1.1 x | missed |"


def test_bundles_are_split_into_those_per_token_and_those_per_sequence() -> None:
    def bundles(context: int) -> int:
        return 64 * (100 + 2 * context)

    assert decode.per_token_and_sequence(bundles(8192), bundles(4096)) == pytest.approx((2.0, 100.0))


def test_every_shard_of_every_model_gets_block_sizes() -> None:
    heads = tables.all_heads()
    assert len(heads) == len(set(heads)) == 19
    assert {(32, 8), (8, 2), (8, 1), (2, 1), (5, 1), (16, 1)} <= set(heads)
    calls = list(tables.all_calls(heads, ("bfloat16",), None))
    assert len(calls) == 19 * 3
    for pages in tables.PAGES.values():  # those of the engine's default and of the other kernels' tests
        assert sorted(page_size for entered in pages.values() for page_size in entered) == [16, 64, 128]


def test_only_entries_with_other_block_sizes_are_changes() -> None:
    key = Call(kernel="decode", num_q_heads=8, num_kv_heads=2).key
    old = Entry(key, 0, 512, asdict(DecodeBlocks(256)), {"margin": 0.5})
    same, other = replace(old, provenance={"margin": 0.1}), replace(old, blocks=asdict(DecodeBlocks(512)))
    new = replace(old, more_than=512, up_to=2048)
    assert tables.changes([old], [same]) == []
    assert tables.changes([old], [other, new]) == [
        f"{key}, up to 512: kv_tokens=512 lanes=1 depth=4 "
        "(kv_tokens=256 lanes=1 depth=4 before; ahead by 50.00%)",
        f"{key}, up to 2048: kv_tokens=256 lanes=1 depth=4 (new; ahead by 50.00%)",
    ]
