"""The commands' arguments. Nothing here imports jax, so that `vsurge --help` answers at once."""

from __future__ import annotations

import argparse
from typing import Any

DEFAULT_MAX_TOKENS = 256  # of `vsurge generate`
DEFAULT_MEMORY_UTILIZATION = 0.9


class ShowVersion(argparse.Action):
    """Looks the version up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .. import __version__

        print(f"vsurge {__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it returns names the command in `command`, None for none."""
    parser = argparse.ArgumentParser(
        prog="vsurge", description="LLM inference in pure JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the version and exit")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, summary: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=summary, parents=[*parents, _debug()], allow_abbrev=False
        )

    add("demo", "Stream answers of the built-in checkpoint.")

    generate = add("generate", "Complete prompts.", _model(), _engine(), _sampling(), _processes())
    generate.add_argument("prompts", nargs="+", metavar="PROMPT",
        help="text to complete; - for stdin; token ids like 1,2,3 if there is no tokenizer")  # fmt: skip
    generate.add_argument("--chat", action="store_true", help="put each prompt into the chat template")
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end")
    generate.add_argument("--truncate-prompt-tokens", type=int, metavar="N",
        help="keep the last N tokens of a longer prompt")  # fmt: skip
    generate.set_defaults(default_max_tokens=DEFAULT_MAX_TOKENS)

    chat = add("chat", "Talk to a model. Ctrl-C stops an answer; /reset forgets; Ctrl-D or /exit leaves.",
        _model(), _engine(), _sampling())  # fmt: skip
    chat.add_argument("--system", metavar="TEXT", help="system message to begin with")
    chat.set_defaults(default_max_tokens=None, truncate_prompt_tokens=None)

    info = add("info", "Size of a model and of its cache; no weights are read.")
    info.add_argument("model", nargs="?", metavar="MODEL",
        help="folder, hub id or published name like 8B (default: the built-in checkpoint)")  # fmt: skip
    info.add_argument("--revision", help="branch, tag or commit of a hub id")
    info.add_argument("--memory", metavar="SIZE",
        help="memory of an accelerator, like 80GB or 16GiB (default: of the one here)")  # fmt: skip
    _add_dtype(info)
    _add_quantization(info)
    _add_cache(info)

    tune = add(
        "tune", "Choose block sizes of a model's attention kernels for a TPU, here or not, or this GPU."
    )
    _add_tuning(tune)

    plan = add("plan", "What a model takes of a slice of TPUs and would do there, without them.")
    _add_planning(plan)

    bench = commands.add_parser(
        "bench", help="Measure this machine, with every figure's denominator.", allow_abbrev=False
    )
    _add_benchmarks(bench)
    return parser


def _add_tuning(tune: argparse.ArgumentParser) -> None:
    add = tune.add_argument
    add(
        "--chip",
        required=True,
        metavar="CHIP",
        help="v4, v5e, v5p, v6e or 7x, or the GPU that is here, like nvidia-h200",
    )
    add("--model", required=True, metavar="MODEL",
        help="folder, hub id or published name like 8B; only its shape is read")  # fmt: skip
    add("--revision", help="branch, tag or commit of a hub id")
    add("--tp", type=int, default=1, metavar="N", help="devices that share the heads (default: 1)")
    add("--kernel", choices=("decode", "ragged", "all"), default="all",
        help="single new tokens, prompts, or both (default)")  # fmt: skip
    add("--kv-dtype", metavar="DTYPE", default="bfloat16", help="of the cache (default: bfloat16)")
    add("--page-size", type=int, default=128, metavar="TOKENS", help="tokens per page (default: 128)")
    add("--contexts", default="128,512,2048,8192,32768", metavar="TOKENS,…",
        help="ends of the ranges of contexts that get their own sizes (default: %(default)s)")  # fmt: skip
    add("--assume", action="append", metavar="NAME=NUMBER",
        help="of the chip, instead of what is known of it: gbytes_per_s, tflops, clock_ghz, latency_us "
        "(default: 1), copy_ns (default: 0); repeatable")  # fmt: skip
    add("--few", action="store_true", help="try a handful of candidates only")
    add("--out", metavar="FILE",
        help="table to write (default: the chip's in VSURGE_HOME, which the kernels read)")  # fmt: skip
    add("--plot", metavar="PNG", help="roofline to draw (default: beside the table)")
    add("--no-plot", action="store_true", help="draw none, which needs no matplotlib")
    add("--json", action="store_true", help="print one JSON object with every candidate")


def _add_planning(plan: argparse.ArgumentParser) -> None:
    add = plan.add_argument
    add("--chip", metavar="SLICE", help="chip and shape of the slice, like v6e:2x4 or tpu7x:2x2x1")
    add("--compare", metavar="SLICE,…", help="several slices, side by side")
    add("--model", required=True, metavar="MODEL",
        help="folder, hub id or published name like 32B; only its shape is read")  # fmt: skip
    add("--revision", help="branch, tag or commit of a hub id")
    add("--tp", type=int, metavar="N",
        help="devices that share the model; the slice holds as many replicas as it has room for "
        "(default: all of the slice, as far as the model can be shared)")  # fmt: skip
    add("--batch", metavar="N,…", default="1,8,32,128",
        help="sequences of a replica that decode together (default: %(default)s)")  # fmt: skip
    add("--context", metavar="TOKENS,…", default="4096",
        help="tokens of each, and of the prompts (default: %(default)s)")  # fmt: skip
    add("--prefill", type=int, metavar="TOKENS", default=1024,
        help="tokens of prompts in a step (default: %(default)s)")  # fmt: skip
    _add_quantization(plan)
    add("--kv-dtype", choices=("bfloat16", "float32", "int8", "float8_e4m3fn"),
        help="of the cache (default: the model's dtype)")  # fmt: skip
    add("--page-size", type=int, default=128, metavar="TOKENS", help="tokens per page (default: 128)")
    add("--memory-utilization", type=float, metavar="SHARE", default=DEFAULT_MEMORY_UTILIZATION,
        help="of the memory beside the weights, for the cache (default: %(default)s)")  # fmt: skip
    add("--assume", action="append", metavar="NAME=NUMBER",
        help="instead of what is known: gbytes_per_s, tflops, clock_ghz, link_gbytes_per_s, latency_us, "
        "copy_ns, hop_us, logit_passes, step_us; repeatable")  # fmt: skip
    add("--plot", metavar="PNG", help="tokens/s of the slice against those of a user, to draw")
    add("--json", action="store_true", help="print one JSON object")


def _add_benchmarks(bench: argparse.ArgumentParser) -> None:
    commands = bench.add_subparsers(dest="what", metavar="WHAT", required=True)

    def add(name: str, summary: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=summary, parents=[*parents, _debug()], allow_abbrev=False
        )

    everything = add("all", "Measure all that this machine can: kernels, steps, the engine and its peers.")
    everything.add_argument("--model", metavar="NAME",
        help="published shape, with random weights (default: 0.6B on a CPU, else 8B)")  # fmt: skip
    everything.add_argument("--only", action="append", choices=("kernels", "steps", "engine", "load"),
        help="a part; repeatable (default: all)")  # fmt: skip
    everything.add_argument("--out", metavar="FOLDER",
        help="where results go (default: MACHINE in the results of a checkout, else here)")  # fmt: skip

    requests = [_model(tokenizer=False), _engine(), _load()]
    throughput = add("throughput", "Time requests that are all there from the start.", *requests)
    throughput.add_argument(
        "--peer",
        action="append",
        choices=("transformers", "vLLM", "llama.cpp", "EasyDeL"),
        help="another engine on the same requests; repeatable",
    )

    serve = add("serve", "Time requests that arrive at random.", *requests)
    serve.add_argument("--rate", metavar="R,…", required=True,
        help="requests a second, on average, of Poisson arrivals; several for a curve")  # fmt: skip
    serve.add_argument("--plot", metavar="PNG", help="latency against load, to draw")

    latency = add("latency", "Time a batch from its prompts to its last token.", *requests[:2])
    _add_lengths(latency, "128", "32")
    latency.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    latency.add_argument("--repeats", type=int, default=5, metavar="N",
        help="how often it is timed (default: 5)")  # fmt: skip
    _add_seed_and_json(latency)

    report = add("report", "Make Markdown tables and pictures of results.")
    report.add_argument("results", nargs="+", metavar="JSON", help="what the other commands wrote")
    report.add_argument("--out", metavar="FOLDER", help="where pictures go (default: beside each file)")
    report.add_argument("--no-plot", action="store_true", help="draw none, which needs no matplotlib")


def _load() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("requests", "random tokens; greedy, and end tokens are ignored")
    group.add_argument("--num-requests", type=int, metavar="N", help="how many (default: 256)")
    _add_lengths(group, "100:1024", "100:1024")
    group.add_argument("--requests", metavar="FILE",
        help='lengths of each: a line {"input_tokens": N, "output_tokens": M}')  # fmt: skip
    _add_seed_and_json(parser)
    return parser


def _add_lengths(group: Any, input_tokens: str, output_tokens: str) -> None:
    for what, default in (("input", input_tokens), ("output", output_tokens)):
        group.add_argument(f"--{what}-tokens", metavar="N[:M]",
            help=f"of each request, or drawn from N to M (default: {default})")  # fmt: skip
        group.set_defaults(**{f"default_{what}_tokens": default})


def _add_seed_and_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N",
        help="of weights and requests (default: 0)")  # fmt: skip
    parser.add_argument("--out", metavar="JSON", help="file to write, with every sample")


def _debug() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--debug", action="store_true", help="show tracebacks and all log messages")
    return parser


def _model(*, tokenizer: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("model")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--model", metavar="MODEL", help="folder or hub id (default: the built-in checkpoint)"
    )
    source.add_argument("--random-weights", metavar="NAME",
        help="random weights in the shape of a published model, like Qwen/Qwen3-0.6B or 0.6B")  # fmt: skip
    group.add_argument("--revision", help="branch, tag or commit of the hub id that --model gives")
    if tokenizer:
        group.add_argument("--tokenizer", metavar="MODEL", help="folder or hub id (default: the model's own)")
    _add_dtype(group)
    _add_quantization(group)
    mesh = group.add_mutually_exclusive_group()
    mesh.add_argument("--tp", type=int, metavar="N",
        help="devices that share the model, each with its part of all heads (default: 1)")  # fmt: skip
    mesh.add_argument("--sharding-axis-dims", metavar="DP,FSDP,EP,TP,SP",
        help="devices along each axis of the mesh; one may be -1 for all that remain")  # fmt: skip
    return parser


def _processes() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group(
        "several processes", "the same command in each; process 0 writes the texts"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where the others can reach process 0")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    return parser


def _add_dtype(group: Any) -> None:
    group.add_argument("--dtype", choices=("bfloat16", "float32"),
        help="of weights and computation (default: the checkpoint's)")  # fmt: skip


def _add_quantization(group: Any) -> None:
    group.add_argument("--quantization", choices=("a8bit", "nf4", "fp8"),
        help="of the projections of attention and MLP: int8, 4-bit NormalFloat or float8 "
        "(default: as the checkpoint is)")  # fmt: skip


def _engine() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("engine")
    group.add_argument("--max-length", type=int, metavar="TOKENS",
        help="longest sequence, prompt and output (default: the model's)")  # fmt: skip
    group.add_argument(
        "--max-concurrent-decodes", type=int, metavar="N", help="sequences that decode together"
    )
    group.add_argument("--max-batched-tokens", type=int, metavar="TOKENS",
        help="most in a step that reads prompts; fewer let others wait less, and the prompt longer "
        "(default: 1024; less if no sequence is that long, more if over 512 decode together)")  # fmt: skip
    group.add_argument(
        "--num-pages", type=int, metavar="N", help="pages of the cache (default: what fits and can be of use)"
    )
    _add_cache(group)
    return parser


def _add_cache(group: Any) -> None:
    group.add_argument("--kv-dtype", choices=("bfloat16", "float32", "int8", "float8_e4m3fn"),
        help="of the cache; the last two take half of bfloat16's memory (default: --dtype's)")  # fmt: skip
    group.add_argument("--page-size", type=int, default=128, metavar="TOKENS",
        help="tokens per page of the cache (default: 128)")  # fmt: skip
    group.add_argument("--memory-utilization", type=float, metavar="SHARE",
        help="of an accelerator's memory beside the weights, for the cache "
        f"(default: {DEFAULT_MEMORY_UTILIZATION})")  # fmt: skip


def _sampling() -> argparse.ArgumentParser:
    """Defaults are the model's (generation_config.json), so an option that is not given stays None."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("sampling", "defaults are those of the model's generation_config.json")
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate (generate: "
        f"{DEFAULT_MAX_TOKENS} by default, chat: as many as fit)")  # fmt: skip
    group.add_argument("--min-tokens", type=int, metavar="N", help="fewest tokens to generate")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="likeliest tokens that sum to this probability"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="this many of the likeliest tokens; 0: all")
    group.add_argument("--min-p", type=float, metavar="P", help="tokens of this share of the likeliest one's")
    group.add_argument("--repetition-penalty", type=float, metavar="P",
        help="divides the logits of tokens that were there, prompt included; above 0, 1: none")  # fmt: skip
    group.add_argument("--presence-penalty", type=float, metavar="P",
        help="taken from the logits of tokens that were generated; -2 to 2")  # fmt: skip
    group.add_argument("--frequency-penalty", type=float, metavar="P",
        help="the same, for each time; -2 to 2")  # fmt: skip
    group.add_argument("--seed", type=int, metavar="N",
        help="of the text (default: a new one) and of random weights (default: 0)")  # fmt: skip
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text (repeatable)")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the end token")
    shape = group.add_mutually_exclusive_group()
    shape.add_argument("--guided-json", metavar="FILE", help="output that this JSON schema accepts")
    shape.add_argument("--guided-regex", metavar="REGEX", help="output that is all of this expression")
    shape.add_argument("--guided-choice", action="append", metavar="TEXT",
        help="output that is one of these (repeatable)")  # fmt: skip
    group.add_argument(
        "--no-thinking", action="store_true", help="chats: have the template skip the thinking"
    )
    return parser
