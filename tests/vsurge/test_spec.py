"""The specification's script runs from its first line to its last."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vsurge import demo_model_path
from vsurge.runtime import blueprint
from vsurge.runtime.inbox import SERVING

CODE = Path(__file__).with_name("spec_script.py").read_text(encoding="utf-8")
# All that may differ from the page.
REPLACEMENTS = {
    "import easydel as ed": "import vsurge.easydel as ed",
    '"Qwen/Qwen3-8B"': repr(str(demo_model_path())),
}
TO_RUN_IT = "# To run this in a script:\n"  # here the page leaves a call of `asyncio.run` to the reader
STREAMING_CALL = "in surge.generate("


def printed(act: Callable[[], Any]) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        act()
    return output.getvalue()


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """The names that the script leaves behind; under "first", "second" and "third" what it prints without
    streaming, with it, and when it streams from the awaited generation."""
    code = CODE
    for old, new in REPLACEMENTS.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    until_results, until_stream, rest = code.split(TO_RUN_IT)
    awaiting = until_stream.replace(STREAMING_CALL, STREAMING_CALL.replace("surge", "await surge"))
    assert awaiting != until_stream

    names = dict[str, Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blueprint, "MAX_PROGRAMS", 4)  # the usual 15 compile for a minute
        exec(compile(until_results, "spec_script.py", "exec"), names)
    names["first"] = printed(lambda: asyncio.run(names["run_non_streaming"]()))
    for name, part in (("second", until_stream), ("third", awaiting)):
        exec(compile(part, "spec_script.py", "exec"), names)
        names[name] = printed(lambda: asyncio.run(names["run_streaming"]()))
    assert names["surge"]._engine._inbox.state in SERVING
    exec(compile(rest, "spec_script.py", "exec"), names)
    return names


def test_the_engine_is_as_large_as_the_page_says_and_stopped_at_the_end(script: dict[str, Any]) -> None:
    surge = script["surge"]
    assert surge.max_length == script["max_length"] == 8192
    assert max(surge._executor.mixed_buckets) == script["prefill_length"] == 4096
    assert max(surge._executor.decode_buckets) == script["max_concurrent_decodes"] == 64
    assert surge._engine._inbox.state not in SERVING


def test_final_results_answer_the_questions_and_tell_their_speed(script: dict[str, Any]) -> None:
    found = re.findall(
        r"Non-Streaming Result for Prompt (\d):\n  Generated Text: (.*)\n  Tokens per second: (.*)\n",
        script["first"],
    )
    assert [number for number, _, _ in found] == ["1", "2"]
    assert found[0][1] == " The capital of France is Paris."
    assert found[1][1].startswith(" Recursion is when a function solves a problem by calling itself")
    assert all(0 < float(speed) < 1e5 for _, _, speed in found)


@pytest.mark.parametrize("output", ["second", "third"], ids=["async for", "async for after await"])
def test_streamed_texts_grow_to_the_answers(output: str, script: dict[str, Any]) -> None:
    for number, beginning in ((1, " Once there was a"), (2, " Photosynthesis is the way")):
        texts = re.findall(rf"Streaming Update for Prompt {number}: (.*)", script[output])
        assert len(set(texts)) > 10
        assert all(new.startswith(old) for old, new in pairwise(texts))
        assert texts[-1].startswith(beginning)
