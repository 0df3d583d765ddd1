"""`vsurge info` against numbers computed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vsurge
from vsurge.cli.info import parse_size

# Qwen3-0.6B: embedding (tied); per layer q, k and v, o, MLP, two norms, q and k norms; the last norm
PARAMETERS = 151936 * 1024 + 28 * (
    2048 * 1024 + 2 * 1024 * 1024 + 1024 * 2048 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
) + 1024  # fmt: skip
WEIGHTS = "model.safetensors"
CACHE_BYTES = 28 * 2 * 8 * 128 * 2  # layers, keys and values, heads, head_dim, bytes of a bfloat16


def rows(out: str) -> dict[str, str]:
    return dict(re.findall(r"^  (\w+)\s+(.*)$", out, flags=re.MULTILINE))


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen3-0.6B", "0.6b"])
def test_a_published_model_needs_neither_weights_nor_network(name: str, command: Callable) -> None:
    done = command("info", name)
    table = rows(done.out)
    assert done.code == 0
    assert done.out.startswith("Qwen/Qwen3-0.6B\n")
    assert table["parameters"] == f"{PARAMETERS:,}" == "596,049,920"
    assert table["weights"] == f"{2 * PARAMETERS:,} bytes (1.19 GB) in bfloat16"
    assert table["cache"] == f"{CACHE_BYTES:,} bytes per token in bfloat16"
    assert table["layers"].startswith("28 of 1,024")
    assert table["heads"] == "16 query, 8 key/value, head_dim 128"
    assert table["fits"].startswith(f"{2**30 // (CACHE_BYTES * 128) * 128:,} tokens in the 1 GiB")


def test_an_untied_model_has_its_output_matrix_too(command: Callable) -> None:
    layer = 4096 * 4096 + 2 * 1024 * 4096 + 4096 * 4096 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
    expected = 2 * 151936 * 4096 + 36 * layer + 4096
    assert rows(command("info", "8B").out)["parameters"] == f"{expected:,}"


def test_of_a_model_with_experts_it_says_what_each_token_takes(command: Callable) -> None:
    table = rows(command("info", "30B-A3B").out)
    expert, experts = 3 * 2048 * 768, 48 * 128
    rest = (
        2 * 151936 * 2048 + 2048 + 48 * (2 * 4096 * 2048 + 2 * 512 * 2048 + 128 * 2048 + 2 * 2048 + 2 * 128)
    )  # embedding and head; q and o, k and v, router, norms
    total, active = rest + experts * expert, rest + 48 * 8 * expert
    assert table["parameters"] == f"{total:,}, {active:,} of them for each token"
    assert (round(total / 1e9, 1), round(active / 1e9, 1)) == (30.5, 3.4)
    assert table["weights"].startswith(f"{2 * total:,} bytes")
    assert table["layers"] == "48 of 2,048 (8 of 128 experts of 768)"


def test_float32_doubles_weights_and_cache(command: Callable) -> None:
    table = rows(command("info", "0.6B", "--dtype", "float32").out)
    assert table["weights"].startswith(f"{4 * PARAMETERS:,} bytes")
    assert table["cache"].startswith(f"{2 * CACHE_BYTES:,} bytes per token in float32")


def test_a_quantized_cache_takes_its_scales_too(command: Callable) -> None:
    for dtype in ("int8", "float8_e4m3fn"):
        cache = rows(command("info", "0.6B", "--kv-dtype", dtype).out)["cache"]
        assert cache == f"{28 * 2 * 8 * (128 + 4):,} bytes per token in {dtype}"
    table = rows(command("info", "0.6B", "--dtype", "bfloat16", "--kv-dtype", "float32").out)
    assert table["weights"].endswith("in bfloat16")
    assert table["cache"] == f"{2 * CACHE_BYTES:,} bytes per token in float32"


def test_quantized_weights_take_their_bits_and_scales(command: Callable) -> None:
    projections = 28 * (2048 * 1024 + 2 * 1024 * 1024 + 1024 * 2048 + 3 * 1024 * 3072)
    outputs = 28 * (2048 + 2 * 1024 + 1024 + 2 * 3072 + 1024)
    rest = 2 * (PARAMETERS - projections)
    for method, size in (("a8bit", projections + 4 * outputs), ("nf4", projections // 2 + projections // 16)):
        table = rows(command("info", "0.6B", "--quantization", method, "--memory", "16GiB").out)
        assert table["weights"].startswith(f"{rest + size:,} bytes")
        assert table["weights"].endswith(f"in {method}, the rest bfloat16")
        pages = int((16 * 2**30 - rest - size) * 0.9) // (CACHE_BYTES * 128)
        assert table["fits"].startswith(f"{pages * 128:,} tokens")


def test_a_quantized_checkpoint_is_described_as_it_is(tmp_path: Path, command: Callable) -> None:
    model = vsurge.load_model(vsurge.demo_model_path(), quantization_method="a8bit")
    folder = vsurge.save_model(model, tmp_path / "saved")
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    weights = rows(command("info", str(folder)).out)["weights"]
    assert weights.startswith(f"{num_bytes:,} bytes")
    assert weights.endswith("in a8bit, the rest bfloat16")
    done = command("info", str(folder), "--quantization", "nf4")
    assert done.code != 0
    assert "is quantized already, as 'a8bit'" in done.err


@pytest.mark.parametrize(
    ("memory", "size", "page_size", "utilization"), [("80GB", 80e9, 128, 0.9), ("16GiB", 16 * 2**30, 16, 0.5)]
)
def test_what_fits_is_whole_pages_in_a_share_of_what_the_weights_leave(
    memory: str, size: float, page_size: int, utilization: float, command: Callable
) -> None:
    options = ("--page-size", str(page_size), "--memory-utilization", str(utilization))
    done = command("info", "0.6B", "--memory", memory, *options)
    pages = int((size - 2 * PARAMETERS) * utilization) // (CACHE_BYTES * page_size)
    assert rows(done.out)["fits"].startswith(f"{pages * page_size:,} tokens in {utilization:g}")


def test_weights_that_do_not_fit_leave_no_tokens(command: Callable) -> None:
    assert rows(command("info", "32B", "--memory", "16GiB").out)["fits"].startswith(
        "nothing: the weights alone"
    )


def test_a_folder_is_described_by_its_config_alone(tmp_path: Path, command: Callable) -> None:
    source = vsurge.demo_model_path() / "config.json"
    (tmp_path / "config.json").write_text(source.read_text())  # no weights, no tokenizer
    config = json.loads(source.read_text())
    table = rows(command("info", str(tmp_path)).out)
    per_token = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * 2
    assert table["cache"].startswith(f"{per_token:,} bytes")
    assert table == rows(command("info").out)  # the built-in checkpoint is the default


def test_the_dtype_is_the_one_that_load_model_would_give(tmp_path: Path, command: Callable) -> None:
    demo = vsurge.demo_model_path()
    for file in demo.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(demo / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    config = json.loads((demo / "config.json").read_text())
    del config["torch_dtype"]
    bfloat16 = rows(command("info").out)
    for named, expected in ((None, "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        config["dtype"] = named
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = vsurge.load_model(tmp_path)
        assert model.params.embedding.dtype == model.config.cache_dtype == expected
        table = rows(command("info", str(tmp_path)).out)
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        assert table["weights"].startswith(f"{num_bytes:,} bytes")
        assert table["weights"].endswith(f" in {expected}")
        assert table["cache"].endswith(f" in {expected}")
        assert (table == bfloat16) == (expected == "bfloat16")
        assert rows(command("info", str(tmp_path), "--dtype", "bfloat16").out) == bfloat16


def test_a_dtype_that_load_model_refuses_is_refused_unless_another_is_asked_for(
    tmp_path: Path, command: Callable
) -> None:
    config = json.loads((vsurge.demo_model_path() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    done = command("info", str(tmp_path))
    assert (done.code, done.out) == (1, "")
    assert f"{tmp_path}/config.json: dtype='float16': supported are" in done.err
    assert rows(command("info", str(tmp_path), "--dtype", "float32").out)["weights"].endswith("in float32")


def test_a_dtype_that_nothing_names_is_said_to_be_assumed(tmp_path: Path, command: Callable) -> None:
    config = json.loads((vsurge.demo_model_path() / "config.json").read_text())
    del config["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert " in bfloat16 (assumed: " in rows(command("info", str(tmp_path)).out)["weights"]
    assert "assumed" not in command("info", str(tmp_path), "--dtype", "float32").out


def test_of_a_hub_id_only_the_config_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, command: Callable
) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def download(repo: str, file: str, revision: str | None = None) -> str:
        asked.append((repo, file, revision))
        return str(vsurge.demo_model_path() / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    done = command("info", "someone/some-model", "--revision", "v2")
    assert done.code == 0
    assert asked == [("someone/some-model", "config.json", "v2")]
    assert rows(done.out) == rows(command("info").out)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("nope",), "nope: no such folder, no hub id, and none of Qwen/Qwen3-0.6B"),
        (("no-one/nothing",), "no-one/nothing: no such folder, and not to be had from the hub"),
        (("0.6B", "--memory", "lots"), "--memory 'lots': must be a size like 80GB"),
        (("0.6B", "--memory", "0GB"), "--memory '0GB': must be"),
        (("0.6B", "--memory", "9" * 400 + "GB"), "--memory '99"),
        (("0.6B", "--memory-utilization", "1.5"), "--memory-utilization 1.5: must lie in (0, 1]"),
        (("0.6B", "--memory-utilization", "0.5"), "--memory-utilization 0.5: has no effect on a CPU, where"),
        (("0.6B", "--revision", "v2"), "--revision v2: 0.6B is short for a hub id; give the id in full"),
        (("--revision", "v2"), "--revision v2: "),
        (("",), "'': no such folder, no hub id"),
        (("not a/valid id",), "not a/valid id: no such folder, and not to be had from the hub"),
        (("0.6B", "--page-size", "0"), "--page-size 0: must be at least 1"),
    ],
)
def test_what_cannot_be_told_is_an_error_of_one_line(
    argv: tuple[str, ...], complaint: str, command: Callable
) -> None:
    done = command("info", *argv)
    assert done.code == 1
    assert done.err.startswith(f"vsurge: error: {complaint}")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("1.5 GiB", 3 * 2**29), ("512m", 512 * 10**6), ("7", 7), ("2TiB", 2**41)],
)
def test_sizes_are_decimal_or_binary_as_their_unit_says(text: str, size: int) -> None:
    assert parse_size(text) == size
