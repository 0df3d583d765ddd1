"""What load_model does with good files; no forward pass runs here."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsurge.model import ConfigError, Qwen3Config, load_model, safetensors_file
from vsurge.model.params import param_specs

from .checkpoints import (
    CONFIG,
    SINGLE,
    assert_holds,
    edit_header,
    pad_header,
    random_tensors,
    write_sharded,
    write_single,
)


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
