"""Hub ids, from a cache laid out as huggingface_hub does, with no network."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from vsurge import demo_model_path
from vsurge.model import CheckpointError, Qwen3Config, load_model
from vsurge.model.loading import find_checkpoint
from vsurge.model.params import param_specs

SHAPE = Qwen3Config(40, 16, 24, 1, 4, 2, 8)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "torch_dtype": "float32", "eos_token_id": 7,
}  # fmt: skip
MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """A cache with two commits of one repository: "main" holds ones, the tag "v1" twos."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--someone--small-qwen3"
    for folder in ("blobs", "refs"):
        (repo / folder).mkdir(parents=True)
    for commit, ref, number in ((MAIN, "main", 1), (OLD, "v1", 2)):
        (repo / "refs" / ref).write_text(commit)
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        tensors = {s.name: np.full(s.shape, number, np.float32) for s in jax.tree.leaves(param_specs(SHAPE))}
        save_file(tensors, repo / "blobs" / f"weights{number}")
        (repo / "blobs" / f"config{number}").write_text(json.dumps(CONFIG))
        (repo / "blobs" / f"generation{number}").write_text(json.dumps({"eos_token_id": [7, 9]}))
        for name, blob in (
            ("model.safetensors", "weights"),
            ("config.json", "config"),
            ("generation_config.json", "generation"),
        ):
            (snapshot / name).symlink_to(f"../../blobs/{blob}{number}")
    return repo


@pytest.mark.parametrize(("revision", "number"), [(None, 1), ("main", 1), ("v1", 2), (OLD, 2)])
def test_a_cached_model_loads_offline_in_the_revision_asked_for(revision, number, hub_cache):
    model = load_model("someone/small-qwen3", revision=revision)
    assert (np.asarray(model.params.embedding) == number).all()
    assert model.source == hub_cache / "snapshots" / (MAIN if number == 1 else OLD)
    assert model.eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    ("name", "revision"), [("someone/small-qwen3", "v2"), ("someone/other", None), ("not a/valid id", None)]
)
def test_what_is_not_to_be_had_is_named(name, revision, hub_cache):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such folder.*{revision or 'main'}"):
        load_model(name, revision=revision)


def test_a_snapshot_that_lacks_its_weights_is_named(hub_cache):
    (hub_cache / "snapshots" / MAIN / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{MAIN}: holds neither model\.safetensors nor"):
        load_model("someone/small-qwen3")


@pytest.mark.parametrize("path", ["./a/b", "/a/b", "a", "a/b/c", "~/b", Path("a/b")])
def test_a_path_is_never_looked_up_on_the_hub(path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(FileNotFoundError, match=r"not a hub id like 'Qwen/Qwen3-0\.6B'"):
        find_checkpoint(path)


def test_an_empty_name_is_not_the_current_folder(monkeypatch):
    monkeypatch.chdir(demo_model_path())
    assert find_checkpoint(".") == Path(".")
    with pytest.raises(FileNotFoundError, match=r"'': must be a folder, or a hub id"):
        find_checkpoint("")


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (None, None, "path_or_hub_id=None: must be a folder, or a hub id like 'Qwen/Qwen3-0.6B'"),
        (b"a/b", None, "path_or_hub_id=b'a/b': must be"),
        ("a/b", 2, "revision=2: must be a branch, tag or commit, or None"),
    ],
)
def test_what_is_no_name_is_refused(name, revision, message, no_type_checker):
    with pytest.raises(TypeError, match=f"^{message}"):
        load_model(name, revision=revision)


def test_a_folder_has_no_revisions(tmp_path):
    with pytest.raises(ValueError, match=r"revision='main'.*local folder"):
        find_checkpoint(tmp_path, revision="main")


def test_only_what_a_checkpoint_needs_is_downloaded(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint("Qwen/Qwen3-0.6B", revision="abc") == tmp_path
    assert (asked["name"], asked["revision"]) == ("Qwen/Qwen3-0.6B", "abc")
    assert {"*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    assert not {"*", "*.bin", "*.pth"} & set(asked["allow_patterns"])
