"""What load_model does with good and bad files; no forward pass runs here."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vsurge.model import CheckpointError, ConfigError, Qwen3Config, checkpoint, load_model, safetensors_file
from vsurge.model.params import param_specs

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPE = Qwen3Config(40, 16, 24, 2, 4, 2, 8)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def random_tensors(dtype: Any = jnp.bfloat16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {s.name: rng.normal(size=s.shape).astype(dtype) for s in jax.tree.leaves(param_specs(SHAPE))}


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def write_single(folder: Path, tensors: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    write_config(folder, **changes)
    save_file(random_tensors() if tensors is None else tensors, folder / SINGLE)
    return folder


def write_sharded(folder: Path) -> Path:
    write_config(folder)
    names = sorted(random_tensors())
    for shard, part in ((FIRST, names[:10]), (SECOND, names[10:])):
        save_file({name: random_tensors()[name] for name in part}, folder / shard)
    weight_map = {name: FIRST if name in names[:10] else SECOND for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_tensors(file: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    edit(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])


def pad_header(file: Path, *, alignment: int, remainder: int = 0) -> int:
    """Pads the header until the tensors begin `remainder` after a multiple of `alignment`; where that is."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    padding = b" " * ((remainder - 8 - size) % alignment)
    header = (size + len(padding)).to_bytes(8, "little") + raw[8 : 8 + size] + padding
    file.write_bytes(header + raw[8 + size :])
    return len(header)


def assert_holds(params: Any, tensors: dict[str, np.ndarray], dtype: Any) -> None:
    for spec, array in zip(jax.tree.leaves(param_specs(SHAPE)), jax.tree.leaves(params), strict=True):
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array), tensors[spec.name].astype(dtype), err_msg=spec.name)


def test_every_tensor_arrives_at_its_place_bit_for_bit(tmp_path):
    model = load_model(write_single(tmp_path))
    assert_holds(model.params, random_tensors(), jnp.bfloat16)
    assert model.source == tmp_path


def test_shards_give_the_same_parameters_as_one_file(tmp_path):
    assert_holds(load_model(write_sharded(tmp_path)).params, random_tensors(), jnp.bfloat16)


def test_shards_that_are_links_out_of_the_folder_are_followed_as_in_the_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for file in write_sharded(blobs).iterdir():
        os.symlink(file, snapshot / file.name)
    assert_holds(load_model(snapshot).params, random_tensors(), jnp.bfloat16)


def test_a_header_of_odd_length_leaves_the_tensors_unaligned_and_intact(tmp_path):
    write_single(tmp_path)
    edit_header(tmp_path / SINGLE, lambda header: header.update(__metadata__={"note": "x"}))
    assert pad_header(tmp_path / SINGLE, alignment=2, remainder=1) % 2 == 1
    assert_holds(load_model(tmp_path).params, random_tensors(), jnp.bfloat16)


# dtype: what is stored, what config.json says, what is asked for, what comes out
DTYPES = [
    (jnp.bfloat16, "bfloat16", None, jnp.bfloat16),
    (np.float32, "float32", None, np.float32),
    (np.float32, "bfloat16", None, jnp.bfloat16),
    (jnp.bfloat16, None, None, jnp.bfloat16),
    (np.float32, None, None, np.float32),
    (np.float32, "float32", "bfloat16", jnp.bfloat16),
    (jnp.bfloat16, "bfloat16", np.float32, np.float32),
    (np.float16, "float16", "float32", np.float32),
    (np.float16, "float16", jnp.bfloat16, jnp.bfloat16),
]


@pytest.mark.parametrize(("stored", "declared", "asked", "expected"), DTYPES)
def test_parameters_have_the_dtype_asked_for_or_else_the_checkpoint_s(
    stored, declared, asked, expected, tmp_path
):
    tensors = random_tensors(stored)
    model = load_model(write_single(tmp_path, tensors, torch_dtype=declared), dtype=asked)
    assert_holds(model.params, tensors, expected)
    assert model.config.dtype == expected


def test_conversion_goes_chunk_by_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "CHUNK_BYTES", 36)
    tensors = random_tensors(np.float32)
    assert_holds(load_model(write_single(tmp_path, tensors)).params, tensors, jnp.bfloat16)


def test_compute_dtype_leaves_the_parameters_alone(tmp_path):
    model = load_model(write_single(tmp_path), compute_dtype="float32")
    assert model.params.embedding.dtype == jnp.bfloat16
    assert model.config.dtype == np.float32


def test_float16_is_refused_unless_another_dtype_is_asked_for(tmp_path):
    write_single(tmp_path, random_tensors(np.float16), torch_dtype="float16")
    with pytest.raises(ConfigError, match=r"float16.*bfloat16.*float32.*dtype="):
        load_model(tmp_path)


def test_a_tied_model_may_store_its_matrix_twice_if_both_are_equal(tmp_path):
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    model = load_model(write_single(tmp_path, tensors, tie_word_embeddings=True))
    assert model.params.lm_head is None


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
    to_device, done = checkpoint.to_device, []

    def interrupted(*args: Any) -> jax.Array:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(0)
        return to_device(*args)

    monkeypatch.setattr(checkpoint, "to_device", interrupted)
    before = len(jax.live_arrays())
    with pytest.raises(KeyboardInterrupt) as caught:
        load_model(tmp_path)
    assert len(done) == 7
    assert caught.tb is not None  # which would keep the arrays alive
    assert len(jax.live_arrays()) == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "options", "shown"),
    [(Terminal, {}, True), (Terminal, {"progress": False}, False), (io.StringIO, {}, False)],
)
def test_progress_is_shown_on_a_terminal_unless_told_otherwise(stderr, options, shown, tmp_path, monkeypatch):
    write_single(tmp_path)
    screen = stderr()
    monkeypatch.setattr(sys, "stderr", screen)
    load_model(tmp_path, **options)
    assert ("loading weights" in screen.getvalue()) == shown
    assert shown or screen.getvalue() == ""


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_host_holds_no_more_than_the_largest_tensor(dtype, tmp_path):
    """Of the file, and in NumPy's memory; after the last tensor nothing is left of either."""
    large = CONFIG | {
        "vocab_size": 4000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 16,
    }
    config = Qwen3Config(4000, 256, 512, 16, 4, 2, 8)
    tensors = {s.name: np.ones(s.shape, jnp.bfloat16) for s in jax.tree.leaves(param_specs(config))}
    write_single(tmp_path, tensors, **large)
    largest = max(tensor.size for tensor in tensors.values()) * (4 if dtype else 2)
    total = sum(tensor.size for tensor in tensors.values()) * (4 if dtype else 2)
    slack = 2 << 20  # Python's own objects
    assert total > 2 * (largest + slack)
    program = [
        sys.executable,
        Path(__file__).with_name("host_memory.py"),
        tmp_path,
        *([dtype] if dtype else []),
    ]
    held = json.loads(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
    assert held["peak"] <= largest + slack
    assert held["mapped"] <= largest + slack
    assert dtype or held["mapped"] > 0  # of a converted tensor nothing stays mapped
    assert held["mapped_at_the_end"] == 0


@pytest.mark.parametrize("remainder", [0, 8])
def test_the_parameters_do_not_live_in_the_file(tmp_path, remainder):
    """Memory at a multiple of 64 bytes is what jax on a CPU would take as it is."""
    write_single(tmp_path)
    pad_header(tmp_path / SINGLE, alignment=64, remainder=remainder)
    model = load_model(tmp_path)
    with (tmp_path / SINGLE).open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(bytes(size))
    assert_holds(model.params, random_tensors(), jnp.bfloat16)
