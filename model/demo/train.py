"""Trains the demo checkpoint on `corpus.txt` and writes it in the Hugging Face layout.

    python -m vsurge.model.demo.train [--out DIR] [--steps 900]

The corpus is a list of documents between lines of `---`. A dialogue (`USER:` and `ASSISTANT:` lines) is
learnt in that form and in the chat template; random dialogues are also strung together, so that the model can
answer the second question of a chat. Runs on two CPU cores; seeded.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..config import Qwen3Config
from ..params import Params, num_parameters, param_specs
from ..progress import progress_bar
from ..qwen3 import KeyValues, Queries, decoder, logits

FOLDER = Path(__file__).parent
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
NO_THOUGHTS = "<think>\n\n</think>\n\n"
VOCABULARY = 1536
# Tokens that the configuration declares, so that an engine may be given long contexts; training is on rows of
# 256, and nothing is learnt of positions beyond.
CONTEXT = 8192

# As Qwen2 and Qwen3 split text before byte-pair encoding: contractions, words, single digits, punctuation,
# space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; a row is a packed sequence of documents."""

    rows: int = 16
    row_length: int = 256
    peak_learning_rate: float = 4e-3
    weight_decay: float = 0.02
    warmup_steps: int = 60
    seed: int = 877


def read_documents(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").strip("\n").split("\n---\n")


def turns_of(document: str) -> list[tuple[str, str]] | None:
    """(question, answer) pairs of a dialogue; None for any other document."""
    if not document.startswith("USER:"):
        return None
    return re.findall(r"USER:(.*?)\nASSISTANT: (.*?)(?=\nUSER:|\Z)", document, flags=re.DOTALL)


def as_chat(turns: list[tuple[str, str]], *, no_thoughts: bool) -> str:
    """The dialogue in the chat template; `no_thoughts` as with enable_thinking=False in the last turn."""
    text = ""
    for index, (question, answer) in enumerate(turns):
        skipped = NO_THOUGHTS if no_thoughts and index == len(turns) - 1 else ""
        text += (
            f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n{skipped}{answer}{TURN_END}\n"
        )
    return text


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level byte-pair encoding, split as Qwen3's."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(pattern=_regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def epoch_of_texts(documents: list[str], rng: random.Random) -> list[str]:
    """Every document once in each of its forms, and chats of two or three random dialogues."""
    dialogues = [turns for turns in map(turns_of, documents) if turns]
    texts = [
        document + ("\n" if document.startswith(TURN_START) else "") + END_OF_TEXT for document in documents
    ]
    texts += [as_chat(turns, no_thoughts=rng.random() < 0.5) + END_OF_TEXT for turns in dialogues]
    shuffled = rng.sample(dialogues, len(dialogues))
    while len(shuffled) > 3:
        joined = [turn for _ in range(rng.choice((2, 2, 3))) for turn in shuffled.pop()]
        if rng.random() < 0.5:
            texts.append(as_chat(joined, no_thoughts=rng.random() < 0.5) + END_OF_TEXT)
        else:
            texts.append("\n".join(f"USER:{q}\nASSISTANT: {a}" for q, a in joined) + END_OF_TEXT)
    rng.shuffle(texts)
    return texts


def pack(sequences: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs token sequences into rows, first fit: token ids, positions and document numbers (0: padding)."""
    rows: list[list[list[int]]] = []
    room: list[int] = []
    for sequence in sequences:
        fitting = next((i for i, free in enumerate(room) if free >= len(sequence)), None)
        if fitting is None:
            rows.append([])
            room.append(length)
            fitting = len(rows) - 1
        rows[fitting].append(sequence[:length])
        room[fitting] -= len(sequence)
    token_ids = np.zeros((len(rows), length), np.int32)
    positions, document = np.zeros_like(token_ids), np.zeros_like(token_ids)
    for row, sequences_in_row in enumerate(rows):
        start = 0
        for number, sequence in enumerate(sequences_in_row, 1):
            end = start + len(sequence)
            token_ids[row, start:end] = sequence
            positions[row, start:end] = np.arange(len(sequence))
            document[row, start:end] = number
            start = end
    return token_ids, positions, document


def dense_attention(document: jax.Array, queries: Queries, keys: KeyValues, values: KeyValues) -> Queries:
    """Causal attention inside each packed document, differentiable; document: [rows, length]."""
    rows, length = document.shape
    shape = (rows, length, -1, queries.shape[-1])
    mask = (document[:, :, None] == document[:, None, :]) & jnp.tril(jnp.ones((length, length), bool))[None]
    output = jax.nn.dot_product_attention(
        queries.reshape(shape), keys.reshape(shape), values.reshape(shape), mask=mask[:, None]
    )
    return output.reshape(queries.shape)


def loss_of(
    params: Params, config: Qwen3Config, token_ids: jax.Array, positions: jax.Array, document: jax.Array
) -> jax.Array:
    """Mean cross-entropy of the next token, in nats, over the tokens that have one in their document."""

    def attend(_: int, queries: Queries, keys: KeyValues, values: KeyValues) -> Queries:
        return dense_attention(document, queries, keys, values)

    x = decoder(params, config, token_ids.reshape(-1), positions.reshape(-1), attend)
    scores = logits(params, config, x).reshape(*token_ids.shape, -1)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores[:, :-1], token_ids[:, 1:])
    weights = ((document[:, 1:] == document[:, :-1]) & (document[:, 1:] > 0)).astype(jnp.float32)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def initial_params(config: Qwen3Config, seed: int) -> Params:
    specs, structure = jax.tree.flatten(param_specs(config))
    keys = jax.random.split(jax.random.key(seed), len(specs))
    leaves = [
        jnp.ones(spec.shape)
        if spec.name.endswith("norm.weight")
        else jax.random.normal(key, spec.shape) * spec.shape[-1] ** -0.5 * 0.7
        for spec, key in zip(specs, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def train(
    config: Qwen3Config, tokenizer: Tokenizer, documents: list[str], recipe: Recipe, steps: int
) -> tuple[Params, float, float]:
    """Trains for a number of steps: the weights in float32, the mean loss of the last 50, and the seconds."""
    rng = random.Random(recipe.seed)
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.peak_learning_rate, recipe.warmup_steps, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=recipe.weight_decay),
    )
    params: Any = initial_params(config, recipe.seed)  # optax does not know our pytrees as types
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, *batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, config, *batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    def batches() -> Any:
        while True:
            texts = epoch_of_texts(documents, rng)
            packed = pack([e.ids for e in tokenizer.encode_batch(texts)], recipe.row_length)
            for start in range(0, len(packed[0]) - recipe.rows + 1, recipe.rows):
                yield tuple(part[start : start + recipe.rows] for part in packed)

    losses: list[float] = []
    source = batches()
    started = time.perf_counter()
    for index in progress_bar(range(steps), "training", show=True, unit="step"):
        params, state, loss = step(params, state, *next(source))
        losses.append(float(loss))
        if index % 100 == 0 or index == steps - 1:
            print(
                f"step {index:5d}  loss {losses[-1]:.4f}  {time.perf_counter() - started:6.0f} s", flush=True
            )
    return params, float(np.mean(losses[-50:])), time.perf_counter() - started


def heldout_loss(params: Params, config: Qwen3Config, tokenizer: Tokenizer, recipe: Recipe) -> float:
    texts = [text + END_OF_TEXT for text in read_documents(FOLDER / "heldout.txt")]
    packed = pack([e.ids for e in tokenizer.encode_batch(texts)], recipe.row_length)
    return float(jax.jit(loss_of, static_argnums=1)(params, config, *map(jnp.asarray, packed)))


def save_checkpoint(folder: Path, params: Params, config: Qwen3Config, tokenizer: Tokenizer) -> None:
    """Writes weights (bfloat16), configuration, tokenizer and generation configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [spec.name for spec in jax.tree.leaves(param_specs(config))]
    arrays = [np.asarray(leaf.astype(jnp.bfloat16)) for leaf in jax.tree.leaves(params)]
    save_file(dict(zip(names, arrays, strict=True)), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    end_of_text, turn_end = (tokenizer.token_to_id(t) for t in (END_OF_TEXT, TURN_END))
    files = {
        "config.json": {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": turn_end,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "model_type": "qwen3",
            "num_attention_heads": config.num_q_heads,
            "num_hidden_layers": config.num_layers,
            "num_key_value_heads": config.num_kv_heads,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "tie_word_embeddings": config.tie_word_embeddings,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": config.vocab_size,
        },
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": [turn_end, end_of_text],
            "pad_token_id": end_of_text,
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": TURN_END,
            "model_max_length": config.max_position_embeddings,
            "pad_token": END_OF_TEXT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: this one)")
    parser.add_argument("--steps", type=int, default=900)
    arguments = parser.parse_args()
    recipe = Recipe()
    documents = read_documents(FOLDER / "corpus.txt")
    tokenizer = train_tokenizer(
        [text for d in documents for text in (d, *(p for t in turns_of(d) or () for p in t))]
    )
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=256,
        num_layers=4,
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        dtype=np.dtype(np.float32),
        matmul_precision=jax.lax.Precision.DEFAULT,
    )
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch(documents))
    print(
        f"{num_parameters(config):,} parameters, {len(documents)} documents, {tokens:,} tokens, "
        f"vocabulary {config.vocab_size}"
    )
    params, loss, seconds = train(config, tokenizer, documents, recipe, arguments.steps)
    heldout = heldout_loss(params, config, tokenizer, recipe)
    print(f"training loss {loss:.4f}, held-out loss {heldout:.3f} nats per token, {seconds / 60:.1f} minutes")
    save_checkpoint(arguments.out, params, config, tokenizer)


if __name__ == "__main__":
    main()
