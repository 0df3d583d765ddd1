"""What a device holds of published models, and the smallest slices that hold them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vsurge.model import Quantization, published_config
from vsurge.model.quantized_specs import weight_bytes
from vsurge.planning import Question, parse_slice
from vsurge.planning.deployment import deploy
from vsurge.planning.fitting import deploy_for, memory_of, smallest_slice, what_is_too_much


def question(model: str, **changes: Any) -> Question:
    options: dict[str, Any] = {
        "config": published_config(model), "quantization": None, "tp": None, "batches": (1, 64),
        "contexts": (4096,), "page_size": 128, "chunk": 1024, "utilization": 0.9, "assumed": {},
    }  # fmt: skip
    return Question(**(options | changes))


def test_a_device_holds_its_share() -> None:
    """Norms are on every device, matrices are split, and 8 KV heads are on 16 devices twice."""
    config = published_config("32B")
    whole = weight_bytes(config, config.dtype)
    for tp in (8, 16):
        deployment = deploy(config, None, parse_slice("v6e:4x4"), tp)
        assert (deployment.tp, deployment.replicas) == (tp, 16 // tp)
        repeated = 2 * config.num_layers * config.hidden_size * 8 * 128 * 2 * (1 / 8 - 1 / tp)
        assert deployment.weight_bytes() == pytest.approx(whole / tp + repeated, rel=1e-3)
        assert deployment.page_bytes(128) == 64 * 128 * 2 * 128 * 2  # one KV head of 64 layers


def test_products_are_all_matrices_but_the_embedding() -> None:
    config = published_config("8B")
    deployment = deploy(config, None, parse_slice("v6e:2x2"), 4)
    products = deployment.products()
    embedding = config.vocab_size * config.hidden_size * 2 // 4
    assert sum(each.num_bytes for each in products) == pytest.approx(
        deployment.weight_bytes() - embedding, rel=1e-3
    )
    assert [each.is_head for each in products] == [False] * 7 * config.num_layers + [True]
    assert products[-1].num_bytes == embedding


@pytest.mark.parametrize(("method", "bytes_per_weight"), [("a8bit", 1), ("fp8", 1), ("nf4", 8.5)])
def test_quantized_weights_are_read_as_they_are_unless_they_are_written_out(
    method: Any, bytes_per_weight: float
) -> None:
    deployment = deploy(published_config("8B"), Quantization(method), parse_slice("v6e:2x2"), 4)
    plain = deploy(published_config("8B"), None, parse_slice("v6e:2x2"), 4)
    down, same = deployment.products()[6], plain.products()[6]
    assert down.num_weights == same.num_weights
    assert down.num_bytes == pytest.approx(bytes_per_weight * same.num_weights, rel=1e-2)


def test_experts_are_split_whole() -> None:
    config = published_config("235B-A22B")
    deployment = deploy(config, None, parse_slice("v6e:4x4"), 16)
    gate = deployment.products()[5]
    assert gate.experts == (128, 8)
    assert gate.num_weights == 128 // 16 * config.hidden_size * 1536
    assert deployment.layout.size("experts") == 16


@pytest.mark.parametrize(
    ("model", "batch", "chip", "name", "tp"),
    [
        ("8B", 1, "v6e", "v6e:1x1", 1),
        ("32B", 1, "v6e", "v6e:2x2", 4),
        ("32B", 64, "v6e", "v6e:2x4", 8),
        ("32B", 1, "7x", "tpu7x:2x2x1", 8),
        ("235B-A22B", 1, "v6e", "v6e:4x4", 16),
    ],
)
def test_the_smallest_slice_holds_weights_and_cache(
    model: str, batch: int, chip: str, name: str, tp: int
) -> None:
    asked = question(model)
    found = smallest_slice(asked, chip, batch, 4096)
    assert found is not None
    assert (found[0].name, found[1]) == (name, tp)
    assert memory_of(deploy(asked.config, None, *found), asked, ()).holds(batch, 4096)


def test_some_models_fit_no_slice_of_a_chip() -> None:
    assert smallest_slice(question("32B"), "v5e", 100_000, 4096) is None


def test_as_many_devices_share_a_model_as_can() -> None:
    """0.6B has 16 query heads."""
    assert deploy_for(question("0.6B"), parse_slice("v6e:4x8")).tp == 16
    assert deploy_for(question("0.6B", tp=4), parse_slice("v6e:4x8")).tp == 4
    with pytest.raises(ValueError, match="--tp 3: must divide the 8 devices of v6e:2x4"):
        deploy_for(question("0.6B", tp=3), parse_slice("v6e:2x4"))
    with pytest.raises(ValueError, match="num_q_heads=16: cannot be split evenly over 32 devices"):
        deploy_for(question("0.6B", tp=32), parse_slice("v6e:4x8"))


def test_what_does_not_fit_is_said_with_numbers() -> None:
    asked = question("32B", tp=1)
    one = memory_of(deploy_for(asked, parse_slice("v6e:1x1")), asked, ())
    assert what_is_too_much(one, 1, 4096).startswith("weights (61.02 GiB), what is remembered of rows")
    assert what_is_too_much(one, 1, 4096).endswith("are more than the 31.25 GiB of a device")
    asked = question("32B", tp=4)
    four = memory_of(deploy_for(asked, parse_slice("v6e:2x2")), asked, ())
    assert f"leave {four.tokens:,} tokens of cache" in what_is_too_much(four, 64, 4096)
    assert "64 of 4,096 tokens need 262,144" in what_is_too_much(four, 64, 4096)


def test_a_cache_in_fewer_bits_holds_more() -> None:
    config = replace(published_config("32B"), kv_dtype=np.dtype(np.int8))
    memories = [
        memory_of(deploy_for(asked, parse_slice("v6e:2x4")), asked, ())
        for asked in (question("32B"), question("32B", config=config))
    ]
    assert 1.9 < memories[1].tokens / memories[0].tokens < 2
