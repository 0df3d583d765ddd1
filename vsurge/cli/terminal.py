"""Text on its way to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax

from ..runtime import Generation, ReturnSample

# A model may write any character; on a terminal, control characters are commands.
HARMLESS = {code: 0xFFFD for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def text_of(sample: ReturnSample, *, has_tokenizer: bool) -> str:
    """What to show of a sample: its text, or its token ids where there is no tokenizer."""
    return sample.text if has_tokenizer else " ".join(map(str, sample.token_ids))


def write(text: str) -> None:
    """Writes to stdout at once."""
    sys.stdout.write(text.translate(HARMLESS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def bold(text: str) -> str:
    """Text in bold on a terminal."""
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def stream_in_order(
    generation: Generation, headings: Sequence[str], *, has_tokenizer: bool
) -> list[ReturnSample]:
    """Writes texts that grow at the same time one after the other, each as it comes; the final samples.

    Args:
        generation: of as many prompts as there are headings.
        headings: written in bold before each text; they contain their own line ends.
        has_tokenizer: whether samples have a text.
    """
    current, shown = 0, 0
    samples: list[ReturnSample] = []
    _write_heading(headings[0])
    for samples in generation:
        while current < len(samples):
            text = text_of(samples[current], has_tokenizer=has_tokenizer)
            write(text[shown:])
            shown = len(text)
            if samples[current].finish_reason is None:
                break
            write("" if text.endswith("\n") else "\n")
            current, shown = current + 1, 0
            if current < len(samples):
                _write_heading(headings[current])
    return samples


def _write_heading(heading: str) -> None:
    sys.stdout.write(bold(heading) if heading else "")
    sys.stdout.flush()


def summary(samples: Sequence[ReturnSample], seconds: float) -> str:
    """Tokens, tokens per second and time to the first token of a run, in one line.

    Args:
        samples: final ones, generated at the same time.
        seconds: from their submission to the end of the last.
    """
    tokens = sum(sample.num_generated_tokens for sample in samples)
    first = min(
        (s.time_to_first_token_s for s in samples if s.time_to_first_token_s is not None), default=0.0
    )
    answers = "1 answer" if len(samples) == 1 else f"{len(samples)} answers"
    return (
        f"{tokens} tokens, {tokens / seconds:.0f} tokens/s, time to first token {first * 1000:.0f} ms "
        f"({answers} in {seconds:.2f} s on {jax.default_backend()})"
    )
