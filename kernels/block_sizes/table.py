"""Tables of block sizes: one JSON file per chip, one line per entry."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from jax import Array

from ..home import home_path
from ..kv_pages import KVPages

TunedKernel = Literal["decode", "ragged"]
Tuned = Literal["mosaic_tpu", "triton", "xla"]  # implementations that a table may name


@dataclass(frozen=True, order=True)
class Key:
    """What block sizes are chosen by, besides the chip and the longest context.

    Attributes:
        kernel: "decode" or "ragged".
        query_dtype, kv_dtype: names of the queries' dtype and of the cache's.
        num_q_heads, num_kv_heads: of one device.
        head_dim, page_size: as everywhere.
    """

    kernel: TunedKernel
    query_dtype: str
    kv_dtype: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int

    @classmethod
    def of(cls, kernel: TunedKernel, queries: Array, kv_pages: KVPages) -> Key:
        """The key of a call, of its `queries` [..., num_q_heads, head_dim]."""
        *_, num_q_heads, head_dim = queries.shape
        dtypes = queries.dtype.name, kv_pages.dtype.name
        return cls(kernel, *dtypes, num_q_heads, kv_pages.num_kv_heads, head_dim, kv_pages.page_size)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Entry:
    """What is fastest for calls whose longest context, in tokens, lies in a range.

    Attributes:
        key: of the calls.
        more_than, up_to: the range of `pages_per_seq * page_size`.
        blocks: fields of the implementation's block sizes; none of "xla".
        provenance: how they were found, for people; see `vsurge tune`.
        implementation: the kernel that is fastest.
    """

    key: Key
    more_than: int
    up_to: int
    blocks: Mapping[str, int]
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    implementation: Tuned = "mosaic_tpu"

    @property
    def replaces(self) -> tuple[Key, int]:
        """What two entries of a table may not have in common: the key, and where the range ends."""
        return self.key, self.up_to


def table_path(chip: str) -> Path:
    """The committed table of a chip, or of a GPU by the name that `device_here` gives it."""
    return Path(__file__).parent / f"{chip}.json"


def user_table_path(chip: str) -> Path:
    """The user's table of a chip, which takes precedence."""
    return home_path() / "block_sizes" / f"{chip}.json"


def read_table(path: Path) -> tuple[Entry, ...]:
    """The entries of a table; none if there is no such file.

    Raises:
        ValueError: the file is no such table; the message names it, the entry and what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    try:
        rows: Any = json.loads(text)["entries"]
        return tuple(_entry(row, at) for at, row in enumerate(rows))
    except (ValueError, KeyError, TypeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: not a table of block sizes ({detail}); repair it, or remove it and run vsurge tune"
        ) from error


def write_table(path: Path, entries: Iterable[Entry]) -> None:
    """Writes a table, sorted, whole or not at all."""
    rows = [_row(entry) for entry in sorted(entries, key=lambda entry: entry.replaces)]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(f'{{"entries": [\n{lines}\n]}}\n', encoding="utf-8")
    unfinished.replace(path)


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """The new entries, and the old ones that they do not replace."""
    return list(({entry.replaces: entry for entry in old} | {e.replaces: e for e in new}).values())


def _row(entry: Entry) -> dict[str, Any]:
    named = {} if entry.implementation == "mosaic_tpu" else {"implementation": entry.implementation}
    return {
        **asdict(entry.key),
        "context": [entry.more_than, entry.up_to],
        **named,
        "blocks": dict(entry.blocks),
        "provenance": dict(entry.provenance),
    }


def _entry(row: Any, at: int) -> Entry:
    values = {known.name: row[known.name] for known in fields(Key)}
    more_than, up_to = row["context"]
    blocks, provenance = row["blocks"], row.get("provenance", {})
    numbers = (*(values[name] for name in list(values)[3:]), more_than, up_to, *blocks.values())
    if values["kernel"] not in get_args(TunedKernel) or not all(type(n) is int for n in numbers):
        raise ValueError(f"entry {at}: kernel must be one of {get_args(TunedKernel)}, sizes must be integers")
    implementation = row.get("implementation", "mosaic_tpu")
    if implementation not in get_args(Tuned):
        raise ValueError(f"entry {at}: implementation {implementation!r} must be one of {get_args(Tuned)}")
    return Entry(Key(**values), more_than, up_to, cast("dict[str, int]", blocks), provenance, implementation)
