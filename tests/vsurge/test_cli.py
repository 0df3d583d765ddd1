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
from vsurge.cli.demo import PROMPTS
from vsurge.cli.parser import build_parser
from vsurge.cli.setup import sampling_changes
from vsurge.model import PUBLISHED

from .small import SMALL

FRANCE = "USER:What is the capital of France?\nASSISTANT:"
THANKS = "USER:How do you say thank you in Chinese?\nASSISTANT:"
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
        "truncate_prompt_tokens": 30,
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
