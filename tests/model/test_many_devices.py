"""On many devices the model is what it is on one, and each device holds, reads and sends its share."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from vsurge.model import load_model, save_model
from vsurge.model.config_json import config_from_json
from vsurge.model.params import TensorSpec, param_specs

from ..devices import printed_by
from .checkpoints import CONFIG
from .many_devices import MESHES

CHANGES = {
    "vocab_size": 48, "intermediate_size": 32, "num_attention_heads": 8, "attention_bias": True,
    "num_hidden_layers": 1, "torch_dtype": "float32",
}  # fmt: skip
LAYERS, HIDDEN, TOKENS, SEQS = 1, 16, 32, 3
SHARDED = [mesh for mesh in MESHES if mesh != "one"]
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 24, "norm_topk_prob": True,
}  # fmt: skip
IN_BLOCKS = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128}  # whole ones on every device
EXPERTS_IN_BLOCKS = {"moe_intermediate_size": 256}


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """A random one that keeps the size of what goes through it."""
    folder.mkdir()
    raw = CONFIG | CHANGES | changes
    (folder / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(0)
    specs: list[TensorSpec] = jax.tree.leaves(param_specs(config_from_json(raw, source="here")))
    save_file(
        {
            name: (rng.normal(size=spec.stored_shape) / math.sqrt(spec.stored_shape[-1])).astype(np.float32)
            for spec in specs
            for name in spec.stored_names
        },
        folder / "model.safetensors",
    )
    return folder


def found_in(*folders: Path) -> dict[str, Any]:
    return printed_by("tests.model.many_devices", *map(str, folders))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `many_devices` prints of a small random checkpoint."""
    return found_in(write_checkpoint(tmp_path_factory.mktemp("here") / "dense"))["dense"]


@pytest.mark.parametrize("mesh", SHARDED)
def test_logits_are_those_of_one_device(found: dict[str, Any], mesh: str) -> None:
    """Of sequences in all states, in a step with prompts and in a step of one token each."""
    assert max(found[mesh]["errors"]) < 1e-5


@pytest.mark.parametrize(
    ("mesh", "parts", "kv_parts"),
    [
        ("tp=2", 2, 2),
        ("tp=4", 4, 2),
        ("tp=8", 8, 2),
        ("dp=2 tp=4", 4, 2),
        ("sp=4", 1, 1),
        ("fsdp=2 tp=2 sp=2", 4, 4),
    ],
)
def test_each_device_holds_its_share_of_every_matrix(
    found: dict[str, Any], mesh: str, parts: int, kv_parts: int
) -> None:
    """Of what makes keys and values it is a KV head's, of which there are two."""
    for name, shares in found[mesh]["weights"].items():
        expected = 1 / (kv_parts if "k_proj" in name or "v_proj" in name else parts)
        assert shares == [expected] * math.prod(MESHES[mesh]), name


@pytest.mark.parametrize(
    ("mesh", "heads"),
    [("tp=2", 1), ("tp=4", 1), ("tp=8", 1), ("sp=4", 2), ("fsdp=2 tp=2 sp=2", 1)],
)
def test_each_device_holds_the_kv_heads_that_its_query_heads_read(
    found: dict[str, Any], mesh: str, heads: int
) -> None:
    """Two there are: with more devices than that several hold the same."""
    assert found["one"]["cache"] == [[16, 2, 2, 4, 8]]
    assert found[mesh]["cache"] == [[16, 2, heads, 4, 8]] * math.prod(MESHES[mesh])


def test_replicas_have_pages_of_their_own(found: dict[str, Any]) -> None:
    assert found["dp=2 tp=4"]["cache"] == [[8, 2, 1, 4, 8]] * 8


@pytest.mark.parametrize("mesh", SHARDED)
def test_every_part_of_a_checkpoint_is_read_once(found: dict[str, Any], mesh: str) -> None:
    """Whoever holds the same part gets it from one reading, and nobody reads more."""
    sizes: dict[str, int] = {}
    for name, part in found[mesh]["read"]:
        sizes[name] = sizes.get(name, 0) + math.prod(stop - start for start, stop in part)
    specs = jax.tree.leaves(param_specs(config_from_json(CONFIG | CHANGES, source="here")))
    assert sizes == {spec.name: spec.size for spec in specs}
    largest = {
        name: max(math.prod(b - a for a, b in part) for other, part in found[mesh]["read"] if other == name)
        for name in sizes
    }
    for name, shares in found[mesh]["weights"].items():
        assert largest[name] == sizes[name] * shares[0], name


@pytest.mark.parametrize("mesh", ["tp=2", "tp=4", "tp=8"])
@pytest.mark.parametrize(("kind", "rows"), [("mixed", TOKENS), ("decode", SEQS)])
def test_a_layer_adds_up_twice_over_the_devices_and_nothing_else_is_sent(
    found: dict[str, Any], mesh: str, kind: str, rows: int
) -> None:
    """And once for the embedding."""
    assert found[mesh]["collectives"][kind] == [["all-reduce", rows * HIDDEN, 2 * LAYERS + 1]]


def test_a_split_sequence_sends_only_new_keys_and_values_and_the_rows_that_need_logits(
    found: dict[str, Any],
) -> None:
    sent = {(kind, size): count for kind, size, count in found["sp=4"]["collectives"]["mixed"]}
    assert sent == {("all-gather", TOKENS * 2 * 8): 2 * LAYERS, ("all-reduce", SEQS * HIDDEN): 1}
    assert found["sp=4"]["collectives"]["decode"] == []


def test_one_device_sends_nothing(found: dict[str, Any]) -> None:
    assert found["one"]["collectives"] == {"mixed": [], "decode": []}


def test_experts_are_read_and_computed_on_their_devices(tmp_path: Path) -> None:
    found = found_in(write_checkpoint(tmp_path / "experts", **EXPERTS))["experts"]
    for mesh, facts in found.items():
        assert max(facts["errors"]) < 1e-5, mesh
        shares = {name: share for name, share in facts["weights"].items() if "experts" in name}
        assert len(shares) == 3 * LAYERS
        assert all(share == [1 / len(share)] * len(share) for share in shares.values()), mesh
        read = [
            math.prod(stop - start for start, stop in part)
            for name, part in facts["read"]
            if "experts" in name
        ]
        assert sum(read) == 3 * LAYERS * 8 * 24 * HIDDEN  # each once


def test_what_is_added_up_can_be_sent_in_bfloat16(tmp_path: Path) -> None:
    """The error is then bfloat16's and nothing worse; without it, see above, it is that of float32."""
    folders = [
        write_checkpoint(tmp_path / name, num_hidden_layers=2, **changes)
        for name, changes in (("rounded", {}), ("rounded-experts", EXPERTS))
    ]
    for facts in found_in(*folders).values():
        (mesh,) = set(facts) - {"one"}
        assert facts["one"]["errors"] == [0, 0]
        assert all(1e-4 < error < 8e-3 for error in facts[mesh]["errors"])


@pytest.mark.parametrize(
    "method", ["a8bit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nf4", "fp8"))]
)
def test_quantized_weights_on_many_devices_are_those_of_one(tmp_path: Path, method: Any) -> None:
    """Quantized by each device while they are read, and read quantized."""
    changes = {} if method == "a8bit" else IN_BLOCKS
    folder = write_checkpoint(tmp_path / method, **changes)
    save_model(load_model(folder, quantization_method=method), tmp_path / "saved")
    mixture = write_checkpoint(tmp_path / f"experts-{method}", **EXPERTS | changes | EXPERTS_IN_BLOCKS)
    for facts in found_in(folder, tmp_path / "saved", mixture).values():
        (mesh,) = set(facts) - {"one"}
        assert facts["one"]["errors"] == [0, 0]
        assert max(facts[mesh]["errors"]) < 1e-5
