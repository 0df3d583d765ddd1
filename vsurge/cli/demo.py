"""`vsurge demo`: the built-in checkpoint answers a few questions, several at a time."""

from __future__ import annotations

import argparse
import sys
import time

from .. import __version__, demo_model_path
from ..home import keep_compiled_programs
from ..model import load_model, num_parameters
from ..runtime import vSurge
from .terminal import bold, stream_in_order, summary

PROMPTS = (
    "USER:What is the capital of France?\nASSISTANT:",
    "USER:Explain the concept of recursion\nASSISTANT:",
    "USER:Tell me a short story about a cat.\nASSISTANT:",
    "USER:Describe the process of photosynthesis.\nASSISTANT:",
)
CHAT = "How do you say thank you in Chinese?"
MAX_TOKENS = 160


def run(args: argparse.Namespace) -> None:  # noqa: ARG001
    # not AutoTokenizer, which imports torch where that is installed
    from transformers import PreTrainedTokenizerFast

    keep_compiled_programs()
    model = load_model(demo_model_path())
    # Few and small buckets: this compiles four programs.
    surge = vSurge.from_model(
        model,
        PreTrainedTokenizerFast.from_pretrained(demo_model_path()),
        max_concurrent_decodes=4,
        max_length=512,
        prefill_lengths=(32, 64),
    )
    million = num_parameters(model.config) / 1e6
    print(
        bold(f"vSurge {__version__}") + f": a Qwen3 of {million:.1f} million parameters, greedy", flush=True
    )
    with surge:
        params = surge.default_sampling_params(max_tokens=MAX_TOKENS)
        headings = [*(f"\n{prompt}" for prompt in PROMPTS), f"\nIn the chat template: {CHAT}\n"]
        started = time.perf_counter()
        # five requests for four places: the last one joins when another has left
        generation = surge.generate([*PROMPTS, [{"role": "user", "content": CHAT}]], params, stream=True)
        samples = stream_in_order(generation, headings, has_tokenizer=True)
        seconds = time.perf_counter() - started
    print(f"\n{summary(samples, seconds)}")
    sys.stdout.flush()
