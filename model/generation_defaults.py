"""What a checkpoint's `generation_config.json` asks for where a request says nothing."""

from __future__ import annotations

import logging
import math
import sys
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


@dataclass(frozen=True)
class _Field:
    """A number in generation_config.json: the sampling parameter it sets and what it may be."""

    parameter: str
    type: type[int] | type[float]
    low: float | int
    high: float | int = math.inf
    low_open: bool = False

    def allows(self, value: float | int) -> bool:
        """Whether a number lies in the range; none that is not finite does."""
        above = self.low < value if self.low_open else self.low <= value
        return above and value <= self.high and (self.type is int or value <= sys.float_info.max)

    @property
    def range(self) -> str:
        """What is allowed, for errors."""
        if self.type is int:
            return f"an integer, at least {self.low}"
        end = "infinity)" if self.high == math.inf else f"{self.high}]"
        return f"a number in {'(' if self.low_open else '['}{self.low}, {end}"


# Those that vLLM takes from the file too; the ranges are those of the sampling parameters.
_SAMPLING = {
    "temperature": _Field("temperature", float, 0.0),
    "top_k": _Field("top_k", int, -1),
    "top_p": _Field("top_p", float, 0.0, 1.0, low_open=True),
    "min_p": _Field("min_p", float, 0.0, 1.0),
    "repetition_penalty": _Field("repetition_penalty", float, 0.0, low_open=True),
    "max_new_tokens": _Field("max_tokens", int, 1),
}
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

    Fields that would change the output and are not supported are named in one logged warning, as a request
    can do without them.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """
    do_sample = raw.get("do_sample")
    if do_sample is not None and type(do_sample) is not bool:
        raise ConfigError(f"{source}: do_sample={do_sample!r}: must be true or false")
    sampling: dict[str, float | int] = {}
    for name, field in _SAMPLING.items():
        value = raw.get(name)
        if value is None:
            continue
        if type(value) not in (int, field.type) or not field.allows(value):
            raise ConfigError(f"{source}: {name}={value!r}: must be {field.range}")
        sampling[field.parameter] = value
    if do_sample is False:
        for name in ("top_k", "top_p", "min_p"):  # without meaning where the likeliest token is taken
            sampling.pop(name, None)
        sampling["temperature"] = 0.0
    known = _SAMPLING.keys() | _USED_ELSEWHERE | _WITHOUT_EFFECT
    ignored = {name: value for name, value in raw.items() if value is not None and name not in known}
    if ignored:
        values = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
        logger.warning("%s: not supported yet, so without effect: %s", source, values)
    return GenerationDefaults(eos_ids(raw.get("eos_token_id"), source), tuple(sampling.items()))
