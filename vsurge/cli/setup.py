"""From arguments to a tokenizer, an engine and sampling parameters."""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from .. import demo_model_path
from ..home import keep_compiled_programs
from ..model import Model, load_model, random_model
from ..model.loading import find_checkpoint
from ..runtime import SamplingParams, vSurge

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
SAMPLING = ("min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos")


def find_model(args: argparse.Namespace) -> Path | None:
    """The model's folder, downloaded first if need be; None for random weights."""
    if args.random_weights is not None:
        return None
    return find_checkpoint(args.model or demo_model_path(), revision=args.revision)


def load_tokenizer(args: argparse.Namespace, folder: Path | None) -> Any:
    """The tokenizer that --tokenizer names, or else the model's; None if it has none."""
    source = args.tokenizer
    if source is None and folder is not None and any((folder / name).exists() for name in TOKENIZER_FILES):
        source = folder
    if source is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def build_engine(
    args: argparse.Namespace, folder: Path | None, tokenizer: Any, *, max_concurrent_decodes: int
) -> vSurge:
    """The engine that the arguments describe, not yet started.

    Args:
        args: of `generate` or `chat`.
        folder: the model's; None for random weights.
        tokenizer: None for prompts and output in token ids.
        max_concurrent_decodes: unless the arguments say otherwise.
    """
    keep_compiled_programs()
    return vSurge.from_model(
        _load(args, folder),
        tokenizer,
        max_concurrent_decodes=given(args.max_concurrent_decodes, max_concurrent_decodes),
        max_length=args.max_length,
        page_size=args.page_size,
        num_pages=args.num_pages,
        memory_utilization=args.memory_utilization,
        seed=given(args.seed, secrets.randbits(32)),
    )


def _load(args: argparse.Namespace, folder: Path | None) -> Model:
    if folder is not None:
        return load_model(folder, dtype=args.dtype, progress=True)
    dtype = given(args.dtype, jnp.bfloat16)
    return random_model(args.random_weights, seed=given(args.seed, 0), dtype=dtype)


def given(value: Any, default: Any) -> Any:
    """The value of an option, or its default if it was not given."""
    return default if value is None else value


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that the arguments set, checked; the others are the model's to choose."""
    changes = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    changes["max_tokens"] = given(args.max_tokens, args.default_max_tokens)
    SamplingParams(**changes)  # wrong values are known before a model is loaded
    return changes


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the chat template."""
    return {"enable_thinking": False} if args.no_thinking else {}
