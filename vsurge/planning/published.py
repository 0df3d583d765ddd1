"""`vsurge plan` held against published serving figures: `python -m vsurge.planning.published`.

The figures are SGLang-JAX's own ("Performance Benchmark Results" in its repository, of September 12, 2025:
commit 10f32e4 on TPU v6e-4, tensor parallelism of 4, bfloat16, random prompts of 1,024 tokens and answers of
1,024, three requests for each concurrent one, `--mem-fraction-static 0.8`, pages of 128).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from ..kernels.tuning import Compilers
from ..model import published_config
from .plan import SlicePlan, plan_slice
from .question import Question
from .slices import parse_slice

PROMPT = OUTPUT = 1024  # tokens
MEMORY_FRACTION = 0.8  # of the memory, for weights and cache
PAGE_SIZE = 128


@dataclass(frozen=True)
class Published:
    """One line of the publication.

    Attributes:
        model: as `vsurge plan` takes it.
        concurrent: requests at a time.
        ttft_ms: until all of them have their first token.
        itl_ms: between tokens.
        tokens_per_s: of output, over the whole run.
    """

    model: str
    concurrent: int
    ttft_ms: float
    itl_ms: float
    tokens_per_s: float


PUBLISHED = (
    Published("Qwen/Qwen3-8B", 8, 117.55, 5.99, 1311.49),
    Published("Qwen/Qwen3-8B", 64, 940.87, 11.11, 5296.60),
    Published("Qwen/Qwen3-8B", 256, 3793.50, 30.00, 7571.84),
    Published("Qwen/Qwen3-32B", 8, 356.59, 18.29, 427.69),
    Published("Qwen/Qwen3-32B", 64, 2864.06, 29.48, 1977.45),
    Published("Qwen/Qwen3-32B", 256, 11500.61, 34.27, 2122.98),
)


def output_tokens_per_s(batch: int, decode_us: float, prompt_us: float) -> float:
    """Of a batch that is always full: every answer's tokens take a step each, and its prompt delays all.

    Args:
        batch: sequences.
        decode_us: a step of all of them.
        prompt_us: the steps of one prompt.
    """
    return batch * OUTPUT / (OUTPUT * decode_us + batch * prompt_us) * 1e6


def together(plan: SlicePlan, concurrent: int) -> int:
    """How many of the concurrent requests the publication's share of the memory holds, at full length."""
    memory = plan.memory
    assert memory is not None
    room = int(memory.capacity * MEMORY_FRACTION) - memory.weights
    return min(concurrent, room // memory.page // -(-(PROMPT + OUTPUT) // PAGE_SIZE))


def planned(model: str, batches: tuple[int, ...], compilers: Compilers) -> SlicePlan:
    question = Question(
        config=published_config(model), quantization=None, tp=4, batches=batches,
        contexts=(PROMPT, PROMPT + OUTPUT // 2), page_size=PAGE_SIZE, chunk=PROMPT, utilization=0.9,
        assumed={},
    )  # fmt: skip
    return plan_slice(question, parse_slice("v6e:2x2"), compilers, show_progress=True)


def compare(compilers: Compilers) -> list[dict[str, float | int | str]]:
    """A row for each published line: what was published, what is predicted, and the ratio."""
    rows = list[dict[str, float | int | str]]()
    for model in dict.fromkeys(line.model for line in PUBLISHED):
        lines = [line for line in PUBLISHED if line.model == model]
        batches = tuple(sorted({line.concurrent for line in lines} | ({100} if "32B" in model else set())))
        plan = planned(model, batches, compilers)
        if plan.refused is not None:
            raise RuntimeError(f"{model}: {plan.refused}")
        for line in lines:
            rows.append(row(line, plan))
    return rows


def row(line: Published, plan: SlicePlan) -> dict[str, float | int | str]:
    batch = together(plan, line.concurrent)
    decode_us = step_us(plan, batch)
    [prompt] = [step for step in plan.prefill if step.context == PROMPT]
    predicted = output_tokens_per_s(batch, decode_us, prompt.time.total)
    return {
        "model": line.model,
        "concurrent": line.concurrent,
        "together": batch,
        "published_itl_ms": line.itl_ms,
        "predicted_step_ms": decode_us / 1e3,
        "published_prompt_tokens_per_s": line.concurrent * PROMPT / line.ttft_ms * 1e3,
        "predicted_prompt_tokens_per_s": PROMPT / prompt.time.total * 1e6,
        "published_tokens_per_s": line.tokens_per_s,
        "predicted_tokens_per_s": predicted,
        "ratio": predicted / line.tokens_per_s,
    }


def step_us(plan: SlicePlan, batch: int) -> float:
    """A decode step at the average context, between those that are predicted in proportion."""
    steps = [step for step in plan.decode if step.context == PROMPT + OUTPUT // 2]
    above = next(step for step in steps if step.batch >= batch)
    below = max((step for step in steps if step.batch <= batch), key=lambda step: step.batch)
    if above.batch == below.batch:
        return above.time.total
    share = (batch - below.batch) / (above.batch - below.batch)
    return below.time.total + share * (above.time.total - below.time.total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    with Compilers() as compilers:
        rows = compare(compilers)
    print(
        f"{'':22}{'at once':>8}{'ms a step':>22}{'prompts, tokens/s':>22}{'output tokens/s':>20}{'ratio':>7}"
    )
    for each in rows:
        print(
            f"{each['model']:<16}{each['concurrent']:>6}{each['together']:>8}"
            f"{each['predicted_step_ms']:>11.2f}{each['published_itl_ms']:>11.2f}"
            f"{each['predicted_prompt_tokens_per_s']:>11,.0f}{each['published_prompt_tokens_per_s']:>11,.0f}"
            f"{each['predicted_tokens_per_s']:>10,.0f}{each['published_tokens_per_s']:>10,.0f}{each['ratio']:>7.2f}"
        )
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
