"""Tables of block sizes: which entry a traced kernel takes, and what happens where there is none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from vsurge.kernels import DecodeBlocks
from vsurge.kernels.block_sizes import Entry, Key, choice, read_table, user_table_path, write_table
from vsurge.kernels.block_sizes.table import merged
from vsurge.kernels.decode.blocks import tuned_or_default_blocks
from vsurge.kernels.tuning import CHIPS, Call, compiler
from vsurge.kernels.tuning.compiler import trace_for

from .jaxprs import equations

DECODE = Call(kernel="decode", num_q_heads=8, num_kv_heads=2, max_seqs=16, max_context=4096)
RAGGED = replace(DECODE, kernel="ragged", max_tokens=256)
KEY = Key("decode", "bfloat16", "bfloat16", 8, 2, 128, 64)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Empty tables, the user's and the committed one, and nothing logged yet."""
    monkeypatch.setenv("VSURGE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "table_path", lambda chip: tmp_path / f"committed-{chip}.json")
    choice._log_once.cache_clear()
    yield tmp_path
    jax.clear_caches()  # of what was traced by these tables


def looked_up(context: int = 4096, *, key: Key = KEY, chip: str = "v6e", seqs: int = 16) -> DecodeBlocks:
    """The sizes for a call that is traced for a chip, without tracing it."""
    with jax.set_mesh(compiler._mesh(CHIPS[chip].topology)):
        return tuned_or_default_blocks(
            key,
            page_size=key.page_size,
            num_kv_heads=key.num_kv_heads,
            pages_per_seq=context // key.page_size,
            most_seqs=seqs,
            token_bytes=1024,
            seq_bytes=1024,
            vmem_bytes=2**26,
        )


def chosen(call: Call, chip: str = "v6e") -> tuple[int, int, int]:
    """(depth, lanes, tokens) of the buffers in vector memory that a traced call's kernel has."""
    traced = trace_for(chip, call.function(), *call.arguments())
    (kernel,) = (
        e
        for e in equations(traced.jaxpr.jaxpr)
        if e.primitive.name == "pallas_call" and call.kernel in e.params["name"]
    )
    (buffer,) = (
        ref.aval.shape
        for ref in kernel.params["jaxpr"].invars
        if len(ref.aval.shape) == 6 and "vmem" in str(ref.aval).lower()
    )
    depth, lanes, _, _, tokens, _ = buffer
    return depth, lanes, tokens


def entry(up_to: int, blocks: dict[str, int], *, more_than: int = 0, key: Key = KEY) -> Entry:
    return Entry(key, more_than, up_to, blocks)


SOME = {"kv_tokens": 256, "lanes": 2, "depth": 3}
OTHER = {"kv_tokens": 512, "lanes": 1, "depth": 5}


def test_a_changed_entry_changes_the_kernel() -> None:
    default = chosen(DECODE)
    for blocks, expected in ((SOME, (3, 2, 256)), (OTHER, (5, 1, 512))):
        write_table(user_table_path("v6e"), [entry(4096, blocks)])
        jax.clear_caches()
        assert chosen(DECODE) == expected != default
    key = replace(KEY, kernel="ragged")
    ragged = {"q_tokens": 32, "kv_tokens": 256, "depth": 4}
    write_table(user_table_path("v6e"), [entry(4096, ragged, key=key)])
    assert chosen(RAGGED) == (4, 1, 256)


def test_explicit_sizes_come_first() -> None:
    write_table(user_table_path("v6e"), [entry(4096, OTHER)])
    assert chosen(replace(DECODE, block_sizes=DecodeBlocks(128, 1, 2))) == (2, 1, 128)


def test_the_users_table_comes_before_the_committed_one_and_both_are_of_a_chip(home: Path) -> None:
    default = looked_up()
    write_table(home / "committed-v6e.json", [entry(4096, SOME)])
    assert looked_up() == DecodeBlocks(**SOME) != default
    write_table(user_table_path("v6e"), [entry(4096, OTHER)])
    assert looked_up() == DecodeBlocks(**OTHER)
    assert looked_up(chip="v5e") == default


def test_the_range_of_contexts_decides(home: Path) -> None:
    write_table(user_table_path("v6e"), [entry(512, SOME), entry(2048, OTHER, more_than=512)])
    assert looked_up(512) == DecodeBlocks(**SOME)
    assert looked_up(576) == looked_up(2048) == DecodeBlocks(**OTHER)
    assert looked_up(4096) == DecodeBlocks(**OTHER)  # beyond all ranges: the nearest one
    write_table(home / "committed-v6e.json", [entry(4096, SOME, more_than=2048)])
    assert looked_up(4096) == DecodeBlocks(**SOME)


@pytest.mark.parametrize(
    "other",
    [
        {"kernel": "ragged"}, {"query_dtype": "float32"}, {"kv_dtype": "int8"}, {"num_q_heads": 16},
        {"num_kv_heads": 4}, {"head_dim": 256}, {"page_size": 128},
    ],
    ids=str,
)  # fmt: skip
def test_a_call_with_another_key_has_no_entry(other: dict[str, Any]) -> None:
    key = replace(KEY, **other)
    default = looked_up(key=key)
    write_table(user_table_path("v6e"), [entry(4096, SOME)])
    assert looked_up(key=key) == default != looked_up()


def test_a_miss_is_logged_once_with_its_key(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vsurge.kernels"):
        looked_up()
        looked_up(seqs=8)  # another program, the same key
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.message == (
        "v6e: no tuned block sizes, a heuristic chooses them for kernel=decode, query_dtype=bfloat16, "
        "kv_dtype=bfloat16, num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=64, context=4096"
    )
    with caplog.at_level(logging.INFO, "vsurge.kernels"):
        looked_up(8192)
    assert len(caplog.records) == 2


def test_several_queries_per_sequence_have_no_table_which_is_logged_once(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_table(home / "committed-v6e.json", [entry(4096, SOME)])
    queries, *rest = DECODE.arguments()
    several = jax.ShapeDtypeStruct((queries.shape[0], 4, *queries.shape[1:]), queries.dtype)
    with caplog.at_level(logging.INFO, "vsurge.kernels"):
        for _ in range(2):
            jax.clear_caches()
            trace_for("v6e", DECODE.function(), several, *rest)
    (record,) = caplog.records
    assert record.message == (
        "v6e: no tuned block sizes for 4 queries per sequence, a heuristic chooses them for kernel=decode, "
        "query_dtype=bfloat16, kv_dtype=bfloat16, num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=64, "
        "context=4096"
    )


def test_without_a_tpu_there_is_no_table_and_no_log_line(caplog: pytest.LogCaptureFixture) -> None:
    user_table_path("v6e").parent.mkdir()
    user_table_path("v6e").write_text("no table")
    with caplog.at_level(logging.DEBUG, "vsurge.kernels"):
        jax.jit(DECODE.function()).trace(*DECODE.arguments())
    assert not caplog.records


@pytest.mark.parametrize("wrong", [{"depth": 10**4}, {"kv_tokens": 96}, {"lanes": 64}, {"depth": 1}])
def test_an_entry_that_does_not_fit_is_passed_over_with_a_warning(
    home: Path, wrong: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    write_table(home / "committed-v6e.json", [entry(4096, OTHER)])
    write_table(user_table_path("v6e"), [entry(4096, SOME | wrong)])
    with caplog.at_level(logging.INFO, "vsurge.kernels"):
        assert looked_up() == DecodeBlocks(**OTHER)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"{user_table_path('v6e')}: not for a call with kernel=decode")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"entries": [{}]}', "KeyError: 'kernel'"),
        ('{"entries": 3}', "TypeError"),
        ('{"entries": [{good, "kernel": "encode"}]}', "kernel must be one of"),
        ('{"entries": [{good, "page_size": "64"}]}', "sizes must be integers"),
        ('{"entries": [{good, "context": [0]}]}', "ValueError"),
    ],
)
def test_a_corrupt_table_is_an_error_that_names_the_file(text: str, complaint: str) -> None:
    path = user_table_path("v6e")
    write_table(path, [entry(4096, SOME)])
    good = path.read_text().splitlines()[1].strip()[1:-1]
    path.write_text(text.replace("good", good))
    with pytest.raises(ValueError, match="not a table of block sizes") as raised:
        looked_up()
    assert str(path) in str(raised.value)
    assert complaint in str(raised.value)


def test_block_sizes_that_the_kernel_does_not_have_are_an_error_that_names_the_file() -> None:
    write_table(user_table_path("v6e"), [entry(4096, {"q_tokens": 16, "kv_tokens": 128})])
    with pytest.raises(ValueError, match=r"v6e\.json: .*q_tokens.*of kernel=decode"):
        looked_up()


def test_a_table_is_read_as_it_was_written_and_merges_by_key_and_range(tmp_path: Path) -> None:
    old = [entry(512, SOME), entry(2048, SOME, more_than=512)]
    new = [replace(old[1], blocks=OTHER, provenance={"by": "predicted"})]
    write_table(tmp_path / "a.json", merged(old, new))
    assert read_table(tmp_path / "a.json") == (old[0], new[0])
    assert len((tmp_path / "a.json").read_text().splitlines()) == 4  # an entry a line
    assert read_table(tmp_path / "missing.json") == ()
