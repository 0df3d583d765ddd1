"""What the commands refuse, and how they say it: one line, and no traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vsurge
from vsurge.cli import main
from vsurge.cli.parser import build_parser
from vsurge.cli.setup import sampling_changes

from .small import SMALL

FRANCE = "USER:What is the capital of France?\nASSISTANT:"


def test_a_wrong_shape_is_refused_before_there_is_a_model(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "nothing"}')
    for argv, complaint in (
        (["--guided-json", str(schema)], "Invalid type: nothing"),
        (["--guided-regex", "[a-"], "unclosed character class"),
    ):
        with pytest.raises(ValueError, match=complaint):
            sampling_changes(build_parser().parse_args(["generate", "x", *argv]))
    schema.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"--guided-json .*schema\.json: is no text in UTF-8"):
        sampling_changes(build_parser().parse_args(["generate", "x", "--guided-json", str(schema)]))


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("--guided-json", "no/such.json"), "No such file or directory"),
        (("--temperature", "-1"), "temperature=-1.0: must lie in [0.0, infinity)"),
        (("--top-p", "0"), "top_p=0.0: must lie in (0.0, 1.0]"),
        (("--min-tokens", "500"), "min_tokens=500: must be at most max_tokens=256"),
        (("--model", "/no/such/folder"), "/no/such/folder: no such folder"),
        (("--model", ""), "'': must be a folder, or a hub id like"),
        (("--model", "{tmp_path}", "--tokenizer", "{demo}"), "config.json: there is no such file"),
        (("--model", "{demo}", "--revision", "main"), "revision='main': "),
        (
            ("--random-weights", "7B", "--tokenizer", "{demo}"),
            "'7B': no published shape of that name; there are",
        ),
        (("--max-length", "100000"), "max_length=100000: must lie between 2 and the model's 8192"),
        (("--num-pages", "0"), "num_pages=0: must be between 1 and 16777215"),
        (("--max-concurrent-decodes", "1000000000000"), "Unable to allocate"),
        (("--max-batched-tokens", "3"), "max_batched_tokens=3: must be at least max_concurrent_decodes=8"),
        (("--memory-utilization", "2"), "--memory-utilization 2.0: must lie in (0, 1]"),
        (("--tokenizer", "/no/such"), "--tokenizer '/no/such': must be a folder with tokenizer.json or"),
        (("--tokenizer", "{tmp_path}"), "--tokenizer '{tmp_path}': must be a folder with tokenizer.json or"),
        (("--tokenizer", ""), "--tokenizer '': must be a folder with tokenizer.json or"),
        (("--tp", "0"), "--tp 0: must be at least 1"),
        (("--tp", "99"), "sharding_axis_dims=(1, 1, 1, 99, 1): needs 99 devices, there are "),
        (
            ("--process-id", "0"),
            "--coordinator: is missing; several processes need all of --coordinator, --pro",
        ),
        (
            ("--coordinator", "h:1", "--process-id", "0"),
            "--num-processes: is missing; several processes need",
        ),
        (("--sharding-axis-dims", "1,1,2"), "sharding_axis_dims=(1, 1, 2): must have 5 entries"),
        (("--sharding-axis-dims", "1,x"), "--sharding-axis-dims '1,x': must be five numbers like 1,1,1,2,1"),
    ],
)
def test_wrong_values_end_with_one_line_that_says_which(
    argv: tuple[str, ...], complaint: str, command: Callable, tmp_path: Path
) -> None:
    filled = [arg.format(tmp_path=tmp_path, demo=vsurge.demo_model_path()) for arg in argv]
    done = command("generate", FRANCE, *filled)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("vsurge: error: ")
    assert complaint.format(tmp_path=tmp_path) in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("--revision", "v2"), "--revision v2: the built-in checkpoint has no revisions; give a hub id with"),
        (("--random-weights", "0.6B", "--revision", "v2"), "--revision v2: random weights have no revisions"),
        (("--no-thinking",), "--no-thinking: is for chats, give --chat too"),
        (("--chat", "--no-thinking", "--tokenizer", "{plain}"),
            "--no-thinking: this model's chat template has no option enable_thinking"),
        (("--random-weights", "0.6B", "--stop", "x"), "--stop 'x': needs a tokenizer, and this model has"),
        (("--memory-utilization", "0.5", "--num-pages", "9"), "has no effect beside --num-pages 9"),
        (("--memory-utilization", "0.5"),
            "--memory-utilization 0.5: has no effect on a CPU, where the cache takes 1 GiB; --num-pages N"),
        (("--top-p", "0.9", "--min-p", "0.1"), "--top-p 0.9, --min-p 0.1: has no effect, for the model"),
    ],
)  # fmt: skip
def test_an_option_that_would_have_no_effect_is_refused(
    argv: tuple[str, ...], complaint: str, command: Callable, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(vsurge.demo_model_path() / name, tmp_path)
    settings = json.loads((vsurge.demo_model_path() / "tokenizer_config.json").read_text())
    plain = settings | {"chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(plain))
    done = command("generate", FRANCE, *(arg.format(plain=tmp_path) for arg in argv))
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("vsurge: error: ")
    assert complaint in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "changes", "complaint"),
    [
        ("config.json", {"vocab_size": "1536"}, "config.json: vocab_size='1536': must be of type int"),
        ("config.json", {"rms_norm_eps": -1}, "config.json: rms_norm_eps=-1"),
        ("config.json", {"eos_token_id": 99999}, "config.json: eos_token_id=99999: the vocabulary has"),
        ("generation_config.json", {"eos_token_id": [1, 1536]}, "generation_config.json: eos_token_id=1536"),
        ("tokenizer.json", None, "; transformers says: KeyError: "),
    ],
)
def test_a_broken_checkpoint_is_told_in_one_line(
    file: str, changes: dict[str, Any] | None, complaint: str, command: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(vsurge.demo_model_path(), folder)
    path = folder / file
    path.write_text(json.dumps({} if changes is None else json.loads(path.read_text()) | changes))
    done = command("generate", FRANCE, "--model", str(folder))
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("vsurge: error: ")
    assert complaint in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "x", "--no-such-option"),
        ("generate", "x", "--temp", "1"),  # no abbreviations
        ("generate",),
        ("generate", "x", "--max-tokens", "many"),
        ("generate", "x", "--dtype", "int4"),
        ("generate", "x", "--model", "a/b", "--random-weights", "0.6B"),
        ("no-such-command",),
        (),
    ],
)
def test_wrong_usage_ends_with_code_2(argv: tuple[str, ...], command: Callable) -> None:
    done = command(*argv)
    assert (done.code, done.out) == (2, "")
    assert "usage: vsurge" in done.err


@pytest.mark.parametrize(
    ("prompts", "complaint"), [(("-", "-"), "stdin can be read only once"), (("a", ""), "prompt 2 is empty")]
)
def test_prompts_that_cannot_be_read_are_refused(
    prompts: tuple[str, ...], complaint: str, command: Callable
) -> None:
    done = command("generate", *prompts)
    assert (done.code, complaint in done.err) == (1, True)


def test_debug_shows_the_traceback(vsurge_home: Path) -> None:
    with pytest.raises(ValueError, match="temperature"):
        main(["generate", "x", "--temperature", "-1", "--debug"])


def test_the_engines_failure_is_one_line_too(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr("vsurge.runtime.executor.Executor.run", fail)
    done = command("generate", FRANCE, *SMALL)
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "out of order" in done.err.splitlines()[-1]


def test_a_prompt_that_is_too_long_is_an_error_of_one_line(command: Callable) -> None:
    done = command("generate", "word " * 100, *SMALL)
    assert (done.code, done.out) == (1, "")
    assert "tokens, must be fewer than max_length=64" in done.err
    assert done.err.count("\n") == 1
    [(name, tokens)] = re.findall(r"(truncate_prompt_tokens)=(\d+) would keep", done.err)
    advised = (f"--{name.replace('_', '-')}", tokens, "--max-tokens", "1")
    assert command("generate", "word " * 100, *SMALL, *advised).code == 0
