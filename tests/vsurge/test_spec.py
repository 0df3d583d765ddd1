"""The specification's script runs from its first line to its last."""

from __future__ import annotations

import contextlib
import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vsurge import demo_model_path

CODE = Path(__file__).with_name("spec_script.py").read_text(encoding="utf-8")
SPEC_CALL = "async for request_output in surge.generate("


@pytest.fixture(scope="module")
def run() -> tuple[str, str]:
    """What the script prints with the demo checkpoint, which reaches 1,024 tokens, for Qwen3-8B; and what it
    prints when it streams again, from the awaited generation."""
    replacements = {
        '"Qwen/Qwen3-8B"': repr(str(demo_model_path())),
        "max_length = 8192": "max_length = 1024",
        "prefill_length = 4096": "prefill_length = 32",
        "max_concurrent_decodes = 64": "max_concurrent_decodes = 2",
    }
    code = CODE
    for old, new in replacements.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    first, second, names = io.StringIO(), io.StringIO(), dict[str, Any]()
    with contextlib.redirect_stdout(first):
        exec(compile(code, "spec_script.py", "exec"), names)
    assert not names["surge"]._engine.is_running
    assert names["surge"].max_length == 1024

    streaming = code[code.index("async def run_streaming") :]
    assert streaming.count(SPEC_CALL) == 1
    names["surge"].start()
    with contextlib.redirect_stdout(second):
        exec(streaming.replace(SPEC_CALL, SPEC_CALL.replace("surge", "await surge")), names)
    return first.getvalue(), second.getvalue()


def test_final_results_answer_the_questions_and_tell_their_speed(run: tuple[str, str]) -> None:
    found = re.findall(
        r"Non-Streaming Result for Prompt (\d):\n  Generated Text: (.*)\n  Tokens per second: (.*)\n", run[0]
    )
    assert [number for number, _, _ in found] == ["1", "2"]
    assert found[0][1] == " The capital of France is Paris."
    assert found[1][1].startswith(" Recursion is when a function solves a problem by calling itself")
    assert all(0 < float(speed) < 1e5 for _, _, speed in found)


@pytest.mark.parametrize("form", ["async for", "async for after await"])
def test_streamed_texts_grow_to_the_answers(form: str, run: tuple[str, str]) -> None:
    output = run[form == "async for after await"]
    for number, beginning in ((1, " Once there was a"), (2, " Photosynthesis is the way")):
        texts = re.findall(rf"Streaming Update for Prompt {number}: (.*)", output)
        assert len(set(texts)) > 10
        assert all(new.startswith(old) for old, new in pairwise(texts))
        assert texts[-1].startswith(beginning)
