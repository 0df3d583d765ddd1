"""`vsurge info`: what a model takes, computed from its configuration and the headers of its weights."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from pathlib import Path

import jax

from .. import demo_model_path
from ..kernels import SUPPORTED_DTYPES, bytes_per_token
from ..model import (
    PUBLISHED,
    ConfigError,
    Quantization,
    Qwen3Config,
    num_active_parameters,
    num_parameters,
    published_config,
)
from ..model.checkpoint import INDEX, SINGLE
from ..model.config import parse_dtype
from ..model.config_json import read_json, stored_dtype
from ..model.loading import chosen_quantization, default_dtype, read_config, read_quantization
from ..model.quantization import parse_method
from ..model.quantized_specs import weight_bytes
from ..runtime.cache_size import CPU_CACHE_BYTES
from .setup import given, share_of_memory

UNITS = {"": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("iB", 1024))
}


def run(args: argparse.Namespace) -> None:
    name = given(args.model, str(demo_model_path()))
    if args.page_size < 1:
        raise ValueError(f"--page-size {args.page_size}: must be at least 1")
    memory = None if args.memory is None else parse_size(args.memory)
    instead = "--memory SIZE describes an accelerator" if memory is None else None
    utilization = share_of_memory(args, instead=instead)
    config, folder = find_config(name, args.revision)
    title = next((full for full, published in PUBLISHED.items() if published is config), name)
    note = ""
    if args.dtype is not None:
        config = dataclasses.replace(config, dtype=parse_dtype(args.dtype, "--dtype"))
    elif folder is not None and says_dtype(folder):
        config = dataclasses.replace(config, dtype=default_dtype(folder, config))
    elif folder is not None:
        note = " (assumed: config.json names no dtype, and there are no weights)"
    if args.kv_dtype is not None:
        kv_dtype = parse_dtype(args.kv_dtype, "--kv-dtype", SUPPORTED_DTYPES)
        config = dataclasses.replace(config, kv_dtype=kv_dtype)
    quantization = find_quantization(args.quantization, folder)
    rows = describe(config, quantization)
    num_bytes = weight_bytes(config, config.dtype, quantization)
    rows["fits"] = fits(config, num_bytes, memory, args.page_size, utilization)
    rows["weights"] += note
    print(title)
    for label, value in rows.items():
        print(f"  {label:<12}{value}")


def find_config(name: str, revision: str | None) -> tuple[Qwen3Config, Path | None]:
    """The configuration of a folder, a published model (nothing is downloaded) or a hub id (one file is).

    With it comes the folder that config.json lies in; None for a published model.

    Raises:
        ConfigError: one that is not supported.
        FileNotFoundError: no such model.
        ValueError: a revision of what has none.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():  # an empty name would be the current folder
        if revision is not None:
            raise ValueError(f"--revision {revision}: {name} is a local folder, which has no revisions")
        return read_config(folder), folder
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    try:
        published = published_config(name)
    except ConfigError:
        published = None
    if published is not None and revision is None:
        return published, None
    if published is not None and not is_hub_id:
        raise ValueError(f"--revision {revision}: {name} is short for a hub id; give the id in full")
    if not is_hub_id:
        raise FileNotFoundError(
            f"{name or repr(name)}: no such folder, no hub id, and none of {', '.join(PUBLISHED)}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder, and not to be had from the hub (revision {revision or 'main'}): {error}"
        ) from error
    return read_config(path.parent), path.parent


def says_dtype(folder: Path) -> bool:
    """Whether a folder tells what dtype `load_model` would give its parameters."""
    path = folder / "config.json"
    named = stored_dtype(read_json(path), source=str(path)) is not None
    return named or any((folder / weights).exists() for weights in (SINGLE, INDEX))


def find_quantization(method: str | None, folder: Path | None) -> Quantization | None:
    """How the weights would be quantized, by --quantization or in the folder's checkpoint.

    Raises:
        ConfigError: the checkpoint is quantized in a way that is not supported.
        ValueError: it is quantized in another way than the option says.
    """
    asked = None if method is None else Quantization(parse_method(method, "--quantization"))
    return asked if folder is None else chosen_quantization(read_quantization(folder), asked, folder)


def cache_bytes_per_token(config: Qwen3Config) -> int:
    """Bytes of the cache that one token takes, over all layers."""
    per_layer = bytes_per_token(config.num_kv_heads, config.head_dim, config.cache_dtype)
    return config.num_layers * per_layer


def describe(config: Qwen3Config, quantization: Quantization | None) -> dict[str, str]:
    """The rows of the table that depend on the model alone; its weights are in the configuration's dtype."""
    num_bytes = weight_bytes(config, config.dtype, quantization)
    form = str(config.dtype) if quantization is None else f"{quantization.method}, the rest {config.dtype}"
    tied = "tied" if config.tie_word_embeddings else "untied"
    parameters, mlp = f"{num_parameters(config):,}", f"MLP {config.intermediate_size:,}"
    if config.experts is not None:
        parameters += f", {num_active_parameters(config):,} of them for each token"
        taken, number = config.experts.experts_per_token, config.experts.num_experts
        dense = (
            f"{mlp} in {len(config.experts.dense_layers)} of them; " if config.experts.dense_layers else ""
        )
        mlp = f"{dense}{taken} of {number} experts of {config.experts.intermediate_size:,}"
    return {
        "parameters": parameters,
        "weights": f"{num_bytes:,} bytes ({gigabytes(num_bytes)}) in {form}",
        "cache": f"{cache_bytes_per_token(config):,} bytes per token in {config.cache_dtype}",
        "layers": f"{config.num_layers} of {config.hidden_size:,} ({mlp})",
        "heads": f"{config.num_q_heads} query, {config.num_kv_heads} key/value, head_dim {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}, {tied} embeddings",
        "context": f"{config.max_length:,} tokens",
    }


def gigabytes(size: int) -> str:
    """Bytes to three figures."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def fits(config: Qwen3Config, num_bytes: int, memory: int | None, page_size: int, utilization: float) -> str:
    """How many tokens of cache fit.

    Args:
        config: of the model.
        num_bytes: what its weights take.
        memory: bytes of the accelerator; None to ask the one that is here.
        page_size: tokens per page; whole pages are counted.
        utilization: share of what the weights leave that the cache takes.
    """
    where = "--memory"
    if memory is None:
        device = jax.devices()[0]
        stats = None if device.platform == "cpu" else device.memory_stats()
        if stats is None:
            tokens = whole_pages(CPU_CACHE_BYTES, config, page_size)
            size = f"{CPU_CACHE_BYTES / 2**30:g} GiB"
            return f"{tokens:,} tokens in the {size} that the cache takes on a CPU (--memory 80GB: elsewhere)"
        memory, where = int(stats["bytes_limit"]), device.device_kind
    free = memory - num_bytes
    if free <= 0:
        return f"nothing: the weights alone take more than the {gigabytes(memory)} of {where}"
    tokens = whole_pages(int(free * utilization), config, page_size)
    return f"{tokens:,} tokens in {utilization:g} of what the weights leave of {gigabytes(memory)} ({where})"


def whole_pages(budget: int, config: Qwen3Config, page_size: int) -> int:
    """Tokens in as many whole pages as `budget` bytes hold."""
    return budget // (cache_bytes_per_token(config) * page_size) * page_size


def parse_size(text: str) -> int:
    """Bytes from "80GB" (10^9) or "16GiB" (2^30).

    Raises:
        ValueError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if match is None else {u.lower(): n for u, n in UNITS.items()}.get(match[2].lower())
    size = 0.0 if match is None or unit is None else float(match[1]) * unit
    if not 0 < size < math.inf:
        raise ValueError(f"--memory {text!r}: must be a size like 80GB (10^9 bytes) or 16GiB (2^30)")
    return int(size)
