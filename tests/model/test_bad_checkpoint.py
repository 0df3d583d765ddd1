"""What load_model does with bad files, and when it is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from vsurge.model import CheckpointError, checkpoint, load_model

from .checkpoints import (
    FIRST,
    INDEX,
    Q_PROJ,
    SECOND,
    SINGLE,
    edit_header,
    edit_index,
    edit_tensors,
    write_config,
    write_sharded,
    write_single,
)


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def untied_head(folder: Path) -> None:
    write_config(folder, tie_word_embeddings=True)


def change_last_number_of_the_head(folder: Path) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][-1, -1] += 1

    write_config(folder, tie_word_embeddings=True)
    edit_tensors(folder / SINGLE, edit)


# damage to a checkpoint of one file, and what the error must say
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no file": (lambda f: (f / SINGLE).unlink(), [SINGLE, INDEX]),
    "empty file": (lambda f: truncate(f / SINGLE, 0), [SINGLE, "not a safetensors file"]),
    "half a header": (lambda f: truncate(f / SINGLE, 200), [SINGLE, "truncated", "192"]),
    "last byte gone": (lambda f: truncate(f / SINGLE, -1), [SINGLE, "truncated", "bytes"]),
    "a byte too many": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes() + b"x"),
        [SINGLE, "damaged"],
    ),
    "garbage": (
        lambda f: (f / SINGLE).write_bytes(bytes(range(256)) * 9),
        [SINGLE, "not a safetensors file"],
    ),
    "a header that is no JSON": (
        lambda f: (f / SINGLE).write_bytes((4).to_bytes(8, "little") + b"{{{{" + bytes(9)),
        [SINGLE, "JSON"],
    ),
    "a header that is a list": (
        lambda f: (f / SINGLE).write_bytes((2).to_bytes(8, "little") + b"[]"),
        [SINGLE, "list", "object"],
    ),
    "a tensor without offsets": (
        lambda f: edit_header(f / SINGLE, lambda h: h[Q_PROJ].pop("data_offsets")),
        [SINGLE, Q_PROJ, "data_offsets"],
    ),
    "overlapping tensors": (
        lambda f: edit_header(
            f / SINGLE, lambda h: h[Q_PROJ].update(data_offsets=h["lm_head.weight"]["data_offsets"])
        ),
        [SINGLE, "not a valid safetensors file"],
    ),
    "a shape that its bytes contradict": (
        lambda f: edit_header(f / SINGLE, lambda h: h[Q_PROJ].update(shape=[16, 16])),
        [SINGLE, "not a valid safetensors file"],
    ),
    "a dtype no library knows": (
        lambda f: edit_header(f / SINGLE, lambda h: h[Q_PROJ].update(dtype="F99")),
        [SINGLE, Q_PROJ, "F99", "BF16"],
    ),
    "a dtype we do not support": (
        lambda f: edit_tensors(f / SINGLE, lambda t: t.update({Q_PROJ: np.zeros((32, 16), np.int16)})),
        [SINGLE, Q_PROJ, "I16", "BF16"],
    ),
    "missing tensor": (
        lambda f: edit_tensors(f / SINGLE, lambda t: t.pop(Q_PROJ)),
        [SINGLE, Q_PROJ, "missing", r"\(32, 16\)"],
    ),
    "extra tensor": (
        lambda f: edit_tensors(f / SINGLE, lambda t: t.update({"visual.w": np.zeros((3, 5), np.float32)})),
        [SINGLE, "visual.w", r"\(3, 5\)"],
    ),
    "transposed tensor": (
        lambda f: edit_tensors(f / SINGLE, lambda t: t.update({Q_PROJ: t[Q_PROJ].T.copy()})),
        [SINGLE, Q_PROJ, r"\(16, 32\)", r"\(32, 16\)"],
    ),
    "config with more layers": (
        lambda f: write_config(f, num_hidden_layers=3),
        [SINGLE, "model.layers.2.", "missing", "config.json"],
    ),
    "config with fewer layers": (
        lambda f: write_config(f, num_hidden_layers=1),
        [SINGLE, "model.layers.1.", "config.json"],
    ),
    "config with another vocabulary": (
        lambda f: write_config(f, vocab_size=41),
        [SINGLE, "embed_tokens", r"\(40, 16\)", r"\(41, 16\)"],
    ),
    "config with biases": (
        lambda f: write_config(f, attention_bias=True),
        [SINGLE, r"_proj\.bias", "missing", "config.json"],
    ),
    "tied, with another head": (
        untied_head,
        [SINGLE, "lm_head.weight", "embed_tokens", "tie_word_embeddings"],
    ),
    "tied, with one number of the head changed": (
        change_last_number_of_the_head,
        [SINGLE, "lm_head.weight", "embed_tokens", "tie_word_embeddings"],
    ),
}

SHARD_DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing shard": (lambda f: (f / SECOND).unlink(), [SECOND, "missing shard", r"model\."]),
    "a shard that is a folder": (
        lambda f: ((f / SECOND).unlink(), (f / SECOND).mkdir()),
        [SECOND, "not a valid safetensors file"],
    ),
    "truncated shard": (lambda f: truncate(f / SECOND, -1), [SECOND, "truncated"]),
    "tensor missing from its shard": (
        lambda f: edit_tensors(f / SECOND, lambda t: t.pop(Q_PROJ)),
        [SECOND, Q_PROJ, "missing", INDEX],
    ),
    "tensor missing from the index": (
        lambda f: edit_index(f, lambda m: m.pop(Q_PROJ)),
        [SECOND, Q_PROJ, INDEX, "does not know"],
    ),
    "tensor in another shard than the index says": (
        lambda f: edit_index(f, lambda m: m.update({Q_PROJ: FIRST})),
        [SECOND, Q_PROJ, INDEX, FIRST],
    ),
    "tensor missing from both": (
        lambda f: (edit_index(f, lambda m: m.pop(Q_PROJ)), edit_tensors(f / SECOND, lambda t: t.pop(Q_PROJ))),
        [INDEX, Q_PROJ, "missing", r"\(32, 16\)"],
    ),
    "index above the folder": (
        lambda f: edit_index(f, lambda m: m.update({Q_PROJ: "../other.safetensors"})),
        [INDEX, Q_PROJ, r"\.\./other", "outside"],
    ),
    "index with an absolute path": (
        lambda f: edit_index(f, lambda m: m.update({Q_PROJ: "/etc/passwd"})),
        [INDEX, Q_PROJ, "/etc/passwd", "outside"],
    ),
    "index with a number for a file": (
        lambda f: edit_index(f, lambda m: m.update({Q_PROJ: 7})),
        [INDEX, Q_PROJ, "7", "file name"],
    ),
    "index with a name that no file can have": (
        lambda f: edit_index(f, lambda m: m.update({Q_PROJ: "a" * 5000})),
        ["aaa: missing shard", INDEX, Q_PROJ],
    ),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "index with a list for a map": (
        lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'),
        [INDEX, "weight_map", r"\['a'\]"],
    ),
    "index that is a list": (lambda f: (f / INDEX).write_text("[]"), [INDEX, "list"]),
    "index that is no JSON": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe{"), [INDEX, "JSON"]),
}
ALL_DAMAGE = [(write_single, *d) for d in DAMAGE.values()] + [
    (write_sharded, *d) for d in SHARD_DAMAGE.values()
]


@pytest.mark.parametrize(("write", "damage", "parts"), ALL_DAMAGE, ids=[*DAMAGE, *SHARD_DAMAGE])
def test_a_bad_checkpoint_is_named_and_leaves_nothing_on_the_device(write, damage, parts, tmp_path):
    damage(write(tmp_path))
    before = len(jax.live_arrays())
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    for part in parts:
        assert caught.match(part)
    assert len(jax.live_arrays()) == before


def test_a_load_that_is_interrupted_half_way_leaves_nothing_on_the_device(tmp_path, monkeypatch):
    write_single(tmp_path)
    to_devices, done = checkpoint.to_devices, []

    def interrupted(*args: Any) -> jax.Array:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(0)
        return to_devices(*args)

    monkeypatch.setattr(checkpoint, "to_devices", interrupted)
    before = len(jax.live_arrays())
    with pytest.raises(KeyboardInterrupt) as caught:
        load_model(tmp_path)
    assert len(done) == 7
    assert caught.tb is not None  # which would keep the arrays alive
    assert len(jax.live_arrays()) == before
