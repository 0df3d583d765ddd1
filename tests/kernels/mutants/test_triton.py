"""Faults put into the kernels for GPUs on purpose: the comparison with the oracle notices each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from vsurge.kernels import append, append_kv, decode, empty_kv_pages, read_kv
from vsurge.kernels.append import triton as append_triton
from vsurge.kernels.decode import triton as decode_triton
from vsurge.kernels.gpu import attend
from vsurge.kernels.ragged import triton as ragged_triton

from ..batches import Setup, decode_batch, ragged_batch
from ..cases import check_decode, check_ragged, sinks_of
from .faults import Patch, changed, named

pytestmark = pytest.mark.usefixtures("small_units")


def check_decode_kernel() -> None:
    setup = Setup(head_dim=16)
    batch = decode_batch(setup, (270, 3, 0, 128, 400))
    check_decode(batch, "triton", soft_cap=5.0, sinks=sinks_of(setup))


def check_ragged_kernel() -> None:
    setup = Setup(head_dim=16)
    batch = ragged_batch(setup, (3, 135, 1, 0), (3, 300, 270, 0))
    check_ragged(batch, "triton", sliding_window=200, sinks=sinks_of(setup))


def check_quantized_kernel() -> None:
    check_decode(decode_batch(Setup(head_dim=16, cache_dtype="int8"), (270, 3, 0, 128, 400)), "triton")


def check_append_kernel() -> None:
    keys, values = jnp.arange(256.0).reshape(2, 4, 2, 16)
    written = append_kv(
        empty_kv_pages(2, 16, 2, 16, "float32"),
        keys,
        values,
        jnp.asarray([3, 17, -1, 9], jnp.int32),
        implementation="triton",
    )
    got = read_kv(written, jnp.arange(32, dtype=jnp.int32))
    for rows, new in zip(got, (keys, values), strict=True):
        want = jnp.zeros_like(rows).at[jnp.asarray([3, 17, 9])].set(new[jnp.asarray([0, 1, 3])])
        assert (rows == want).all()


def of_row(change: Callable[[Any, Any, int], tuple[Any, Any, int]]) -> Callable[[Patch], None]:
    """`change` says of which page, head and kind rows are taken instead."""
    return lambda patch: changed(
        patch, attend, "cache_row", lambda f, geometry, *place: f(geometry, *change(*place))
    )


def of_load(change: Callable[..., tuple[Any, ...]]) -> Callable[[Patch], None]:
    """`change` gives sequence, head, places and which of them are read."""
    return lambda patch: changed(
        patch, attend, "_load", lambda f, geometry, cache, *where: f(geometry, cache, *change(*where))
    )


def of_loaded(change: Callable[..., tuple[Any, ...]]) -> Callable[[Patch], None]:
    """`change` gives keys, their scales, values and theirs from those that were loaded."""
    return lambda patch: changed(patch, attend, "_load", lambda f, *arguments: change(*f(*arguments)))


def of_range(change: Callable[..., Any]) -> Callable[[Patch], None]:
    """`change` gives the last arguments of `attend_range`: positions, sequence, head, first, end."""

    def patched(f: Any, geometry: Any, cache: Any, queries: Any, *rest: Any) -> Any:
        return f(geometry, cache, queries, *change(*rest))

    def fault(patch: Patch) -> None:
        changed(patch, decode_triton, "attend_range", patched)
        changed(patch, ragged_triton, "attend_range", patched)

    return fault


def of_geometry(**changes: Callable[[Any], Any]) -> Callable[[Patch], None]:
    def fault(patch: Patch) -> None:
        for module in (decode_triton, ragged_triton):
            changed(
                patch,
                module,
                "attend_range",
                lambda f, geometry, *rest: f(
                    replace(
                        geometry,
                        **{name: change(getattr(geometry, name)) for name, change in changes.items()},
                    ),
                    *rest,
                ),
            )

    return fault


def last_block_dropped(patch: Patch) -> None:
    lax = SimpleNamespace(**vars(jax.lax))
    lax.fori_loop = lambda lower, upper, body, start: jax.lax.fori_loop(lower, upper - 1, body, start)
    patch.setattr(attend, "lax", lax)


def never_rescaled(module: Any) -> Callable[[Patch], None]:
    """Of sums that meet a new largest score."""

    def exp2(x: Any) -> Any:
        return jnp.exp2(x) if x.ndim == 2 else jnp.ones_like(x)

    return lambda patch: patch.setattr(module, "jnp", SimpleNamespace(**vars(jnp) | {"exp2": exp2}))


def products_in_bfloat16(patch: Patch) -> None:
    low = jnp.bfloat16
    changed(patch, attend, "_dot", lambda f, left, right: f(left.astype(low), right.astype(low)))


def sinks_ignored(patch: Patch) -> None:
    under = decode.IMPLEMENTATIONS["triton"]
    patch.setitem(decode.IMPLEMENTATIONS, "triton", lambda *a, **o: under(*a, **o | {"sinks": None}))


def of_parts(change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    return lambda patch: changed(patch, decode_triton, "cut", lambda f, *a, **o: change(f(*a, **o)))


def of_blocks(change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    return lambda patch: changed(patch, ragged_triton, "cut", lambda f, *a: change(f(*a)))


def of_append(change: Callable[..., tuple[Any, ...]]) -> Callable[[Patch], None]:
    """`change` gives keys, values and slots."""

    def fault(patch: Patch) -> None:
        under = append.IMPLEMENTATIONS["triton"]
        patch.setitem(append.IMPLEMENTATIONS, "triton", lambda pages, *new: under(pages, *change(*new)))

    return fault


def skips_nothing(patch: Patch) -> None:
    patch.setattr(
        append_triton, "pl", SimpleNamespace(**vars(append_triton.pl) | {"when": lambda _: lambda f: f()})
    )


DECODE_FAULTS = {
    "neighbouring page": of_row(lambda page, head, kind: (jnp.maximum(page - 1, 0), head, kind)),
    "keys and values swapped": of_row(lambda page, head, kind: (page, head, 1 - kind)),
    "another head": of_row(lambda page, head, kind: (page, 1 - head, kind)),
    "another sequence's pages": of_load(lambda sequence, *rest: (sequence * 0, *rest)),
    "unseen keys read": of_load(lambda *where: (*where[:-1], None)),
    "one token further": of_load(lambda s, h, places, read: (s, h, places + 1, read)),
    "one key too many": of_range(lambda positions, *rest: (positions + 1, *rest[:-1], rest[-1] + 1)),
    "one key too few": of_range(lambda positions, *rest: (positions - 1, *rest)),
    "scale one percent off": of_geometry(scale=lambda scale: scale * 0.99),
    "soft cap ignored": of_geometry(soft_cap=lambda _: None),
    "last block dropped": last_block_dropped,
    "earlier blocks not rescaled": never_rescaled(attend),
    "earlier parts not rescaled": never_rescaled(decode_triton),
    "products in bfloat16": products_in_bfloat16,
    "sinks ignored": sinks_ignored,
    "a sequence's last part dropped": of_parts(
        lambda parts: parts._replace(starts=jnp.maximum(parts.starts - 1, 0))
    ),
    "parts overlap": of_parts(lambda parts: parts._replace(first=jnp.maximum(parts.first - 1, 0))),
}
RAGGED_FAULTS = {
    "window one wider": of_geometry(sliding_window=lambda window: window + 1),
    "window one narrower": of_geometry(sliding_window=lambda window: window - 1),
    "a block begins one token late": of_blocks(lambda blocks: blocks._replace(position=blocks.position + 1)),
    "a block is one token short": of_blocks(
        lambda blocks: blocks._replace(num_tokens=jnp.maximum(blocks.num_tokens - 1, 0))
    ),
    "queries of the next block": of_blocks(lambda blocks: blocks._replace(start=blocks.start + 1)),
}
QUANTIZED_FAULTS = {
    "scale of another token": of_loaded(lambda k, ks, v, vs: (k, jnp.concatenate([ks[1:], ks[:1]]), v, vs)),
    "key scales ignored": of_loaded(lambda k, ks, v, vs: (k, ks * 0 + 0.02, v, vs)),
    "value scales ignored": of_loaded(lambda k, ks, v, vs: (k, ks, v, vs * 0 + 0.02)),
    "key and value scales swapped": of_loaded(lambda k, ks, v, vs: (k, vs, v, ks)),
}
APPEND_FAULTS = {
    "write to the neighbour": of_append(lambda k, v, slots: (k, v, jnp.where(slots < 0, slots, slots + 1))),
    "values written as keys": of_append(lambda k, v, slots: (v, k, slots)),
    "padding written": skips_nothing,
}
# They follow entries of the page table that hold anything, or write before the cache.
OUT_OF_BOUNDS = [
    *(DECODE_FAULTS[name] for name in (
        "another sequence's pages", "unseen keys read", "one token further", "one key too many",
    )),
    APPEND_FAULTS["padding written"],
]  # fmt: skip
FAULTS = [
    *named(
        "decode",
        check_decode_kernel,
        DECODE_FAULTS,
        {"neighbouring page", "unseen keys read", "parts overlap"},
    ),
    *named("ragged", check_ragged_kernel, RAGGED_FAULTS, {"window one wider"}),
    *named("quantized", check_quantized_kernel, QUANTIZED_FAULTS, {"key and value scales swapped"}),
    *named("append", check_append_kernel, APPEND_FAULTS),
]


@pytest.fixture(autouse=True)
def traced_anew(monkeypatch: Patch) -> None:
    """Calls the functions under their jit, which would answer with what it compiled before the fault."""
    for module, name in (
        (decode_triton, "attend"),
        (ragged_triton, "attend_decodes"),
        (ragged_triton, "_attend"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    jitted: Any = append_triton.append_kv
    monkeypatch.setitem(append.IMPLEMENTATIONS, "triton", jitted.__wrapped__)


@pytest.mark.parametrize(
    "check", [check_decode_kernel, check_ragged_kernel, check_quantized_kernel, check_append_kernel]
)
def test_without_a_fault_the_check_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.usefixtures("no_type_checker")
@pytest.mark.parametrize(("check", "fault"), FAULTS)
def test_a_fault_is_noticed(
    check: Callable[[], None], fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    if fault in OUT_OF_BOUNDS and jax.default_backend() == "gpu":
        pytest.skip("compiled, it reads or writes memory of others, and may end the process's use of the GPU")
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check()
