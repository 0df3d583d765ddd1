"""`vsurge generate`, `vsurge demo`, and what all commands have in common."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import vsurge
from vsurge.cli import main
from vsurge.cli.demo import PROMPTS
from vsurge.cli.parser import build_parser
from vsurge.cli.setup import sampling_changes
from vsurge.model import PUBLISHED

FRANCE = "USER:What is the capital of France?\nASSISTANT:"
THANKS = "USER:How do you say thank you in Chinese?\nASSISTANT:"
SMALL = ("--max-length", "64", "--max-concurrent-decodes", "2")  # three programs to compile
SUMMARY = r"^\d+ tokens, \d+ tokens/s, time to first token \d+ ms \(%s in \d+\.\d\d s on \w+\)$"


def test_texts_of_several_prompts_come_one_after_the_other(command: Callable) -> None:
    done = command("generate", THANKS, FRANCE, *SMALL)
    assert done.code == 0
    assert done.out == (
        f"[1/2] {THANKS}\n In Chinese, thank you is 谢谢 (xièxie).\n"
        f"\n[2/2] {FRANCE}\n The capital of France is Paris.\n"
    )
    assert re.match(SUMMARY % "2 answers", done.err)


def test_json_tells_everything_about_every_sample(command: Callable) -> None:
    options = ("--max-tokens", "5", "--ignore-eos", "--temperature", "0.9", "--seed", "3")
    done = command("generate", FRANCE, FRANCE, "--json", *options, *SMALL)
    document = json.loads(done.out)
    first, second = document["samples"]
    assert first["prompt"] == second["prompt"] == FRANCE
    assert first["token_ids"] == second["token_ids"]  # the same seed
    assert len(first["token_ids"]) == first["num_generated_tokens"] == 5
    assert first["finish_reason"] == "length"
    assert first["time_to_first_token_s"] > 0
    assert document["num_generated_tokens"] == 10
    assert document["tokens_per_second"] == pytest.approx(10 / document["seconds"])


def test_a_prompt_from_stdin_goes_through_the_chat_template_if_asked(
    command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\n"))
    done = command("generate", "-", "--chat", "--stop", " Paris", *SMALL)
    assert done.out == "The capital of France is\n"
    assert re.match(SUMMARY % "1 answer", done.err)


def test_a_published_shape_runs_on_random_weights_and_token_ids(
    command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(
        PUBLISHED["Qwen/Qwen3-0.6B"],
        vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, num_q_heads=2, num_kv_heads=1,
        head_dim=16, eos_token_ids=(),
    )  # fmt: skip
    monkeypatch.setitem(PUBLISHED, "Qwen/Qwen3-tiny", tiny)
    options = ("--random-weights", "tiny", "--seed", "1", "--temperature", "0", "--max-tokens", "6",
        "--max-length", "16", "--max-concurrent-decodes", "2")  # fmt: skip
    done = command("generate", "1,2,3", *options)
    assert re.fullmatch(r"\d+( \d+){5}\n", done.out)
    assert command("generate", "1, 2, 3", *options).out == done.out

    refused = command("generate", "some text", *options)
    assert (refused.code, refused.out) == (1, "")
    assert "prompt 'some text': this model has no tokenizer; give one with --tokenizer" in refused.err
    assert "needs a tokenizer" in command("chat", "--random-weights", "tiny").err
    assert "--chat: needs a tokenizer" in command("generate", "1", "--chat", "--random-weights", "tiny").err
    outside = command("generate", "1,64", *options)
    assert (outside.code, "64 is outside the vocabulary" in outside.err) == (1, True)


def test_a_model_with_experts_gives_the_greedy_tokens_of_transformers(
    command: Callable, tmp_path: Path
) -> None:
    demo = vsurge.demo_model_path()
    config = json.loads((demo / "config.json").read_text())
    shape: dict[str, Any] = {
        "vocab_size": config["vocab_size"], "hidden_size": 64, "intermediate_size": 96, "head_dim": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
        "moe_intermediate_size": 48, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "max_position_embeddings": 256,
    }  # fmt: skip
    theirs: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    theirs.save_pretrained(tmp_path)
    for file in demo.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path)
    options = ("--model", str(tmp_path), "--temperature", "0", "--max-tokens", "16", "--ignore-eos", *SMALL)
    document = json.loads(command("generate", FRANCE, "--json", *options).out)
    prompt = AutoTokenizer.from_pretrained(tmp_path)(FRANCE, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs.generate(prompt, do_sample=False, max_new_tokens=16, eos_token_id=None)
    assert document["samples"][0]["token_ids"] == expected[0, prompt.shape[1] :].tolist()


def test_every_sampling_option_sets_its_parameter() -> None:
    options = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.8, "top_k": 7, "min_p": 0.1,
        "repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.25, "seed": 4,
    }  # fmt: skip
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    args = build_parser().parse_args(["generate", "x", *argv, "--stop", "a", "--stop", "b", "--ignore-eos"])
    assert sampling_changes(args) == options | {"stop": ["a", "b"], "ignore_eos": True}
    # what is not given is left to generation_config.json
    assert sampling_changes(build_parser().parse_args(["generate", "x"])) == {"max_tokens": 256}
    assert sampling_changes(build_parser().parse_args(["chat"])) == {"max_tokens": None}


def test_output_can_be_given_a_shape(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [7]}')
    for argv, shape in (
        (["--guided-json", str(schema)], {"json": '{"enum": [7]}'}),
        (["--guided-regex", "[ab]{3}c"], {"regex": "[ab]{3}c"}),
        (["--guided-choice", "yes", "--guided-choice", "no"], {"choice": ["yes", "no"]}),
    ):
        changes = sampling_changes(build_parser().parse_args(["generate", "x", *argv]))
        assert changes == {"guided_decoding": shape, "max_tokens": 256}


def test_a_wrong_shape_is_refused_before_there_is_a_model(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "nothing"}')
    for argv, complaint in (
        (["--guided-json", str(schema)], "Invalid type: nothing"),
        (["--guided-regex", "[a-"], "unclosed character class"),
    ):
        with pytest.raises(ValueError, match=complaint):
            sampling_changes(build_parser().parse_args(["generate", "x", *argv]))


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
        ("tokenizer.json", None, "the tokenizer of "),
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


def test_no_thinking_closes_the_thought_in_a_chat(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    generate = vsurge.vSurge.generate

    def record(self: vsurge.vSurge, *args: Any, **options: Any) -> Any:
        seen.append(options["chat_template_kwargs"])
        return generate(self, *args, **options)

    monkeypatch.setattr(vsurge.vSurge, "generate", record)
    done = command("generate", "What is the capital of France?", "--chat", "--no-thinking", *SMALL)
    assert (done.code, done.out) == (0, "The capital of France is Paris.\n")
    assert seen == [{"enable_thinking": False}]


def test_a_temperature_gives_what_narrows_the_choice_its_effect(command: Callable) -> None:
    options = ("--top-k", "3", "--max-tokens", "3", *SMALL)
    for temperature in ("0", "0.5"):
        assert command("generate", FRANCE, "--temperature", temperature, *options).code == 0


@pytest.fixture
def demo_asking_for(tmp_path: Path) -> Callable[..., str]:
    """The demo checkpoint with other contents of generation_config.json."""

    def copy(**changes: Any) -> str:
        folder = tmp_path / "model"
        shutil.copytree(vsurge.demo_model_path(), folder)
        file = folder / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return str(folder)

    return copy


def test_a_default_that_is_not_supported_yet_is_a_warning(
    command: Callable, demo_asking_for: Callable
) -> None:
    folder = demo_asking_for(num_beams=3)
    done = command("generate", FRANCE, "--model", folder, *SMALL)
    assert (done.code, done.out) == (0, " The capital of France is Paris.\n")
    warning, _ = done.err.splitlines()
    assert warning.startswith(f"vsurge: {folder}/generation_config.json: not supported yet")
    assert warning.endswith("num_beams=3")


def test_a_default_out_of_range_is_an_error_that_names_the_file(
    command: Callable, demo_asking_for: Callable
) -> None:
    folder = demo_asking_for(top_p=0.0)
    done = command("generate", FRANCE, "--model", folder, *SMALL)
    assert (done.code, done.out) == (1, "")
    expected = f"{folder}/generation_config.json: top_p=0.0: must be a number in (0.0, 1.0]"
    assert done.err == f"vsurge: error: {expected}\n"


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


def test_the_version_is_the_packages(command: Callable) -> None:
    assert command("--version").out == f"vsurge {vsurge.__version__}\n"


def test_a_reader_that_leaves_is_no_error(vsurge_home: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # it has left before anything is written
    argv = [sys.executable, "-m", "vsurge", "info", "0.6B"]
    try:
        done = subprocess.run(
            argv, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_demo_answers_and_a_later_run_finds_its_programs(process: Callable, vsurge_home: Path) -> None:
    done = process("demo")
    assert (done.code, done.err) == (0, "")
    for prompt in PROMPTS:
        assert f"\n{prompt} " in done.out
    assert f"{FRANCE} The capital of France is Paris.\n" in done.out
    assert "In Chinese, thank you is 谢谢 (xièxie).\n" in done.out
    assert re.match(SUMMARY % "5 answers", done.out.splitlines()[-1])

    def programs() -> set[str]:
        return {path.name for path in (vsurge_home / "compiled").glob("*-cache")}

    before = programs()
    assert len(before) >= 4
    again = process("demo")
    assert programs() == before
    assert again.out.splitlines()[:-1] == done.out.splitlines()[:-1]


def test_a_machine_without_a_tpu_says_nothing_of_it(vsurge_home: Path) -> None:
    """Though libtpu is installed, and jax asks it first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    environment.pop("JAX_PLATFORMS", None)
    argv = [sys.executable, "-m", "vsurge", "info", "0.6B"]  # which asks for the devices
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0
    assert "TPU" not in done.stderr
    assert "Source Location" not in done.stderr
