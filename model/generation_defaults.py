"""What a checkpoint's `generation_config.json` asks for where a request says nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import ConfigError
from .config_json import eos_ids

logger = logging.getLogger("vsurge.model")


@dataclass(frozen=True)
class GenerationDefaults:
    """The defaults of a model.

    Attributes:
        eos_token_ids: tokens that end a sequence.
        sampling: sampling parameters by their vLLM names, as far as the file sets them.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: tuple[tuple[str, float | int], ...] = ()


# generation_config.json field -> sampling parameter, those that vLLM takes from the file too
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_NEUTRAL = {"repetition_penalty": 1.0}  # so the parameter need not be passed on
_INTEGERS = {"top_k", "max_new_tokens"}
_USED_ELSEWHERE = {"do_sample", "eos_token_id"}
# Fields of transformers' own bookkeeping, and ids that stand elsewhere.
_WITHOUT_EFFECT = {
    "_from_model_config", "bos_token_id", "cache_implementation", "output_attentions", "output_hidden_states",
    "output_scores", "pad_token_id", "return_dict_in_generate", "transformers_version", "use_cache",
}  # fmt: skip


def generation_defaults_from_json(
    raw: Mapping[str, Any], *, source: str = "generation_config.json"
) -> GenerationDefaults:
    """The defaults in a `generation_config.json`; `do_sample: false` means temperature 0.

    A field that would change the output and is not supported is named in one logged warning, as a request can
    do without it.

    Raises:
        ConfigError: a value is not a number, or eos_token_id holds no token ids.
    """
    sampling: dict[str, float | int] = {}
    for name, parameter in _SAMPLING.items():
        value = raw.get(name)
        if value is None or value == _NEUTRAL.get(name):
            continue
        allowed = (int,) if name in _INTEGERS else (int, float)
        if type(value) not in allowed:
            expected = "an integer" if name in _INTEGERS else "a number"
            raise ConfigError(f"{source}: {name}={value!r}: must be {expected}")
        sampling[parameter] = value
    if raw.get("do_sample") is False:
        for name in ("top_k", "top_p", "min_p"):  # without meaning where the likeliest token is taken
            sampling.pop(name, None)
        sampling["temperature"] = 0.0
    ignored = {
        name: value
        for name, value in raw.items()
        if value is not None and name not in _SAMPLING.keys() | _USED_ELSEWHERE | _WITHOUT_EFFECT
    }
    if ignored:
        logger.warning("%s: without effect here: %s", source, ignored)
    return GenerationDefaults(eos_ids(raw.get("eos_token_id"), source), tuple(sampling.items()))
